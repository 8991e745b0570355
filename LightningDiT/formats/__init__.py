"""File layouts of other programs, told and read without those programs."""
