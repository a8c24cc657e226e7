"""The tables of arXiv 2102.06700, measured again: plans, rows that resume, and reports.

A table is a plan of rows (`plans`); a row trains a network or asks one question of it, and is one file (`rows`,
`questions`); a report puts the rows together (`reports`), beside what was published (`published`).
"""
