"""The adapter itself: where it starts, how it is attached, how its scale moves, how it is stored."""
