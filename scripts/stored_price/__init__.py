"""What stored rotations gain and cost as the width grows."""
