"""A session as one self-contained HTML file: `render` takes what was read and gives the page.

    page       the whole page: what Python writes into it, and what stands packed in it
    index      what the list is made of, and what is searched: a little of every test and case
    cases      one case in detail
    pictures   bitmaps and EPT paging structures, and what of them was met
    passed     accesses of L2 that did not exit, as far as the program tells
    text       what no document can hold, spelled out
    parts      the details, packed in pieces that a browser unpacks when they are wanted
    overview   what stands above: verdicts by engine, what to look at, reasons
    assets/    template, style and script

The page asks for nothing: no server, no file besides it. What a guest or a test wrote gets into it as data
only, which the script puts into text nodes; what the template writes is escaped by Jinja.
"""
