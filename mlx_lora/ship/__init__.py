"""What was trained goes out: cut to size, in other formats, merged, fused, talked to."""
