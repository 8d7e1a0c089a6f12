"""The methods that rdopt is compared with, after their papers, and the harness that compares them."""
