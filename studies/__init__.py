"""What reproduces the pages of docs; run from the project's folder, never installed."""
