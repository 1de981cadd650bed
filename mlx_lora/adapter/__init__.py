"""The adapter itself: where it starts, how it is attached, how its scale moves, its files."""
