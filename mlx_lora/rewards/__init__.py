"""What a completion earns: the answer in it, several rewards as one, and a user's own."""
