"""Define which shapes of an answer are recognised, and read their parts. Pure.

Servers that call themselves compatible spell the same facts in many ways: text as a string, a list of parts
or an object; reasoning in a field, in a part or between tags inside the text; ends by many words; the whole
answer inside an envelope. The tables of these modules list what is recognised. `data/FORMAT.md` shows the
same tables, and a test compares the two. What is not recognised is kept in `raw` and reported as not
understood: such an answer never gets the outcome `ok`.
"""
