"""What an adapter is, seen through its singular values: spectra, alerts, advice, pictures."""
