"""`python -m mlx_lora` is the command line."""

from mlx_lora.cli import main

if __name__ == "__main__":
    main()
