"""Coverage-guided fuzzing of everything that reads what others wrote: `make fuzz`.

`parsers` has a function per parser that raises when a promise is broken, `seeds` makes each one's first
inputs of real files, `harness` lets atheris (libFuzzer) loose on one parser, `__main__` does so on each in
turn.
"""
