"""WikiText's rows and its style, on lines as they stand in the corpus."""

import pytest

from pipeline.wikitext import join_rows, styled, styled_documents

LINES = [
    " \n",
    " = Robert <unk> = \n",
    " \n",
    " He had a role in 1 @,@ 234 plays ; it 's said . \n",
    " = = Career = = \n",
    " \n",
]


def test_rows_are_joined_as_the_hubs_are():
    """The Hub's row for a blank line is empty, any other row keeps its newline; two newlines between rows."""
    hub = ["", LINES[1], "", LINES[3], LINES[4], ""]
    assert join_rows(LINES) == "\n\n".join(hub)
    assert join_rows(line.rstrip("\n") for line in LINES) == "\n\n".join(hub)


def test_rows_at_the_edges():
    assert join_rows([]) == ""
    assert join_rows([" \n"]) == ""
    assert join_rows(["no newline at the end"]) == "no newline at the end\n"


@pytest.mark.parametrize(
    ("plain", "wikitext"),
    [
        # numbers
        ("In 1999, 12,345,678 of 1,234.5 cats", "In 1999 , 12 @,@ 345 @,@ 678 of 1 @,@ 234 @.@ 5 cats"),
        ("50% of $5", "50 % of $ 5"),
        # hyphens and dashes
        ("a well-known ex-cat", "a well @-@ known ex @-@ cat"),
        ("pages 10-12, 1990–95", "pages 10 @-@ 12 , 1990 – 95"),
        # quotes and apostrophes
        ("“Hello,” she said", '" Hello , " she said'),
        ("it’s the boys' cat", "it 's the boys ' cat"),
        # initials and abbreviations keep their full stop
        ("J. R. R. Tolkien met Dr. No of the U.S. Army", "J. R. R. Tolkien met Dr. No of the U.S. Army"),
        ("St. John was No. 1. He won", "St. John was No. 1 . He won"),
        # sentence ends
        ("It ended. Then it began.", "It ended . Then it began ."),
        ("Who? Me! (Yes) So: this; that", "Who ? Me ! ( Yes ) So : this ; that"),
        ('He said "stop." Then', 'He said " stop . " Then'),
        # spaces
        ("  two  spaces\tand a tab ", "two spaces and a tab"),
    ],
)
def test_plain_prose_in_wikitexts_style(plain, wikitext):
    assert styled(plain) == f" {wikitext} "


def test_text_in_the_style_keeps_it():
    assert styled("one , two @-@ three . Four") == " one , two @-@ three . Four "
    assert styled(" 1 @,@ 234 ") == " 1 @,@ 234 "


def test_documents_are_titled_rows():
    corpus = "A cat\nIt sat.\n\nIt ate.\n<|endoftext|>\nOnly a title\n<|endoftext|>\n\n<|endoftext|>B\nEnd.\n"
    first, second = styled_documents(corpus)
    assert first == "\n\n".join(["", " = A cat = \n", "", " It sat . \n", " It ate . \n", ""])
    assert second == "\n\n".join(["", " = B = \n", "", " End . \n", ""])
