"""Elements of a page."""

from html.parser import HTMLParser


class Elements(HTMLParser):
    """Elements with their attributes, and the text between them."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.found = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, [name for name, _ in attrs]))
        self.text += "".join(value or "" for _, value in attrs)

    def handle_endtag(self, tag):
        self.found.append(f"/{tag}")

    def handle_comment(self, data):
        self.found.append("comment")

    def handle_decl(self, decl):
        self.found.append("declaration")

    def unknown_decl(self, data):
        self.found.append("declaration")

    def handle_pi(self, data):
        self.found.append("instruction")

    def handle_data(self, data):
        self.text += data
