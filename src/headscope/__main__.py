"""The command as a module: python -m headscope."""

from headscope.commands import main

if __name__ == "__main__":
    main()
