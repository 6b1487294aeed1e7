"""The page about runs, and the runs that it reads."""
