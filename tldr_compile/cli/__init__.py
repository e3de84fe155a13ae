"""The command line: `tldr run` shows on a real clip what the compiler pass does. Needs the extra `demo`."""
