"""How results are shown: tables in a terminal, figures as files. It knows nothing of what they say.

`figures` is the one style of all figures, `tables` of all tables. rich and matplotlib are imported
when a table or a figure is made.
"""
