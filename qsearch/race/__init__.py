"""Race: whole denoisers, other tools and single layers timed on this machine."""
