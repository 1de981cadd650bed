"""What leaves the house: an adapter at the rank it uses. Each ends by calling the check."""
