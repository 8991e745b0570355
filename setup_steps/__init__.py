"""What steps 1 to 3, the repair of the statistics and quickstart are made of.

Nothing here imports torch or the library at module level: the modules must load on a machine
where step 1 has not run yet.
"""
