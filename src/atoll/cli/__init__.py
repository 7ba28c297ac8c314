"""The command line: one file a command, all of them thin over workflows, hub and engine. Data goes to stdout, everything else to stderr."""
