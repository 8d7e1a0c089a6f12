"""Room checkpoint: Hugging Face folders to arrays and back, one tensor at a time, nothing half-written."""
