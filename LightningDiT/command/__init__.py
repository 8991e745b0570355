"""The console command `lightningdit`: one name for every entry point, and the commands that have no other."""
