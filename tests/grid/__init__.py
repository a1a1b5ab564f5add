"""Every kind of choice through every verb: carried out, and then right by `simulate`, or refused in
one line.
"""
