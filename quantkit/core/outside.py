"""What this process has begun outside of itself, and nobody else would end: a server beside it.

While there is any, Ctrl-C is an exception wherever it comes, so that it is ended first; else it may
end the process at once (cli/process.py).
"""

begun: set[object] = set()
