"""`rdopt analyze`: one model in several coordinate systems, and what that says about the project's hypotheses."""
