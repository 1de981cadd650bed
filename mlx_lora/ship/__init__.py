"""What was trained goes out: other formats, merged, fused, talked to. Each way out is proven."""
