"""`python -m benchmarks`. Child processes import this module too: the command is loaded only where it runs."""

if __name__ == "__main__":
    from benchmarks.command import main

    main()
