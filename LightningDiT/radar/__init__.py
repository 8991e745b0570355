"""Micro-Doppler spectrograms of people who walk: a simulator of individual walkers before a radar. Needs NumPy."""
