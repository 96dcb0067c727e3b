"""Functions of another module than the pipeline's, which read texts in C."""

import functools

ONE, TWO = 1.0, 2.0


def shouted(text):
    return f"{text} !".upper()


def has_cat(text):
    return "cat" in f"a {text}"


def reading_first(function):
    @functools.wraps(function)
    def reading(text):
        return int(ord(text[0]) == 97) + function(text)

    return reading


@reading_first
def decorated(text):
    return int(text.startswith("2"))


class Shouter:
    def __init__(self, template):
        self.template = template

    def shout(self, text):
        return self.template.format(text).upper()

    def found(self, text):
        return text in self.template
