"""The command line: ids and data on stdout, progress on stderr, exit codes that say what happened."""
