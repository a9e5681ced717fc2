"""``medmamba new-mixer``: the beginning of a package that adds a mixer and its core.

template/     its files; ``$name``, ``$title`` stand for the mixer; ``.txt`` says that they are no code of ours
package.py    checks the name and writes them
commands.py   the command
"""
