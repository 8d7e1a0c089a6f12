"""Room `study`: what weights look like in given coordinates, and what a file, run or folder holds."""
