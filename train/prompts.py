"""Fixed prompts over all kinds of pictures that the embedded models learn from, eight of each, to look at."""


def _fill(template: str, *words: str) -> tuple[str, ...]:
    return tuple(template.format(word) for word in words)


PROMPTS = {
    "photo": _fill(
        "a photo of a {}", "goldfish", "school bus", "teapot", "zebra", "violin", "pizza", "banana", "monarch butterfly"
    ),
    "place": _fill(
        "a photo of a {}", "beach", "forest path", "kitchen", "street", "mountain", "bridge", "church", "canyon",
    ),
    "flower": _fill(
        "a photo of a {} flower", "sunflower", "rose", "daffodil", "water lily", "poppy", "bluebell", "lotus", "tulip"
    ),
    "painter": _fill(
        "a painting by {}", "Claude Monet", "Vincent van Gogh", "Rembrandt", "Pablo Picasso", "Katsushika Hokusai",
        "Ivan Aivazovsky", "Amedeo Modigliani", "Piet Mondrian",
    ),
    "genre": _fill(
        "{}", "a landscape painting", "a portrait painting", "a still life painting", "an abstract painting",
        "a painting of a city", "a flower painting", "a religious painting", "a woodblock print, Ukiyo-e",
    ),
    "emoji": _fill(
        "a Google Noto emoji of a {}", "red apple", "smiling face", "house", "blue car", "green tree", "yellow star",
        "dog", "heart",
    ),
    "drawing": (
        "a flat emoji of a fish", "a 3D emoji of a whale", "a blob emoji of a ghost", "a pencil sketch of a horse",
        "a pencil sketch of a guitar", "a cartoon of a dog", "a cartoon of an elephant", "clip art of a house",
    ),
    "layout": (
        "top red, bottom blue", "left yellow, right purple", "center white, left black, right black",
        "top light blue, center green, bottom brown", "orange and dark green", "black and white", "pink and beige",
        "dark blue",
    ),
}  # fmt: skip
