"""How people ask for each kind of edit: wordings to train with, and others to test with.

In a wording, `{thing}` and `{other}` stand for things ("the red circle"), `{new}` for one to come
("red circle"), `{colour}`, `{second}`, `{shape}` and `{place}` for names.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wording:
    """Sentences for one kind of edit. The held-out ones appear in no training instruction.

    added: training wordings that came after the shipped model's training, and were taught to its
    text encoder alone (`train/wordings.py`). They use only words of the others, so that the
    tokenizer stays what it is.
    """

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    added: tuple[str, ...] = ()


WORDINGS: dict[str, Wording] = {
    "recolour": Wording(
        (
            "make {thing} {colour}",
            "turn {thing} {colour}",
            "paint {thing} {colour}",
            "recolour {thing} to {colour}",
            "change {thing} to {colour}",
            "change the colour of {thing} to {colour}",
            "{thing} should be {colour}",
            "give {thing} the colour {colour}",
            "I want {thing} to be {colour}",
            "set the colour of {thing} to {colour}",
        ),
        (
            "paint {thing} in {colour}",
            "I want {thing} {colour}",
            "make the colour of {thing} {colour}",
        ),
        (
            "let {thing} be {colour}",
            "set {thing} to {colour}",
            "turn the colour of {thing} into {colour}",
            "use {colour} to paint {thing}",
            "show {thing} in {colour}",
        ),
    ),
    "remove": Wording(
        (
            "remove {thing}",
            "delete {thing}",
            "erase {thing}",
            "take {thing} away",
            "take away {thing}",
            "get rid of {thing}",
            "make {thing} disappear",
            "{thing} should be gone",
            "remove {thing} from the picture",
            "erase {thing} from the image",
        ),
        ("delete {thing} from the picture", "I want {thing} gone", "take {thing} out of the image"),
        (
            "take out {thing}",
            "get {thing} out of the picture",
            "let {thing} disappear",
            "put {thing} away",
            "make {thing} be gone",
            "I want {thing} to disappear",
        ),
    ),
    "add": Wording(
        (
            "add a {new} at the {place}",
            "add a {new} to the {place}",
            "put a {new} at the {place}",
            "draw a {new} at the {place}",
            "place a {new} in the {place}",
            "insert a {new} at the {place}",
            "at the {place}, add a {new}",
            "there should be a {new} at the {place}",
            "I want a {new} in the {place}",
            "draw a {new} in the {place} of the picture",
        ),
        (
            "insert a {new} in the {place}",
            "at the {place}, draw a {new}",
            "I want a {new} at the {place}",
        ),
        (
            "I want to have a {new} at the {place}",
            "let there be a {new} at the {place}",
            "show a {new} at the {place}",
            "give the picture a {new} at the {place}",
            "insert a {new} into the {place} of the image",
        ),
    ),
    "reshape": Wording(
        (
            "turn {thing} into a {shape}",
            "change {thing} into a {shape}",
            "make {thing} a {shape}",
            "replace {thing} with a {shape}",
            "change the shape of {thing} to a {shape}",
            "{thing} should be a {shape}",
            "give {thing} the shape of a {shape}",
            "I want {thing} to be a {shape}",
            "transform {thing} into a {shape}",
            "make a {shape} out of {thing}",
        ),
        (
            "transform {thing} to a {shape}",
            "replace the shape of {thing} with a {shape}",
            "I want {thing} to turn into a {shape}",
        ),
        (
            "let {thing} turn into a {shape}",
            "{thing} should turn into a {shape}",
            "set the shape of {thing} to a {shape}",
            "transform the shape of {thing} into a {shape}",
            "I want {thing} to have the shape of a {shape}",
            "turn {thing} to a {shape}",
            "make the shape of {thing} a {shape}",
            "let {thing} be a {shape}",
        ),
    ),
    "enlarge": Wording(
        (
            "enlarge {thing}",
            "make {thing} bigger",
            "make {thing} larger",
            "grow {thing}",
            "scale {thing} up",
            "scale up {thing}",
            "increase the size of {thing}",
            "{thing} should be bigger",
            "I want {thing} to be larger",
            "{thing} should be larger",
        ),
        (
            "I want {thing} bigger",
            "increase the scale of {thing}",
            "make the size of {thing} bigger",
        ),
        (
            "increase {thing}",
            "make {thing} grow",
            "let {thing} grow",
            "the size of {thing} should be larger",
            "give {thing} a bigger size",
            "change the size of {thing} to be bigger",
            "make the scale of {thing} larger",
            "give {thing} a larger scale",
            "scale {thing} to be bigger",
            "I want {thing} to grow",
            "enlarge the scale of {thing}",
            "turn the size of {thing} up",
        ),
    ),
    "shrink": Wording(
        (
            "shrink {thing}",
            "make {thing} smaller",
            "scale {thing} down",
            "scale down {thing}",
            "reduce the size of {thing}",
            "decrease the size of {thing}",
            "{thing} should be smaller",
            "I want {thing} to be smaller",
            "make {thing} tiny",
            "reduce {thing}",
        ),
        (
            "I want {thing} smaller",
            "decrease the scale of {thing}",
            "make the size of {thing} smaller",
        ),
        (
            "decrease {thing}",
            "make {thing} shrink",
            "let {thing} shrink",
            "the size of {thing} should be smaller",
            "give {thing} a smaller size",
            "change the size of {thing} to be smaller",
            "make the scale of {thing} smaller",
            "give {thing} a smaller scale",
            "scale {thing} to be smaller",
            "I want {thing} to shrink",
            "reduce the scale of {thing}",
            "turn the size of {thing} down",
        ),
    ),
    "move": Wording(
        (
            "move {thing} to the {place}",
            "shift {thing} to the {place}",
            "slide {thing} to the {place}",
            "put {thing} at the {place}",
            "move {thing} into the {place}",
            "{thing} should be at the {place}",
            "place {thing} at the {place}",
            "push {thing} to the {place}",
            "I want {thing} at the {place}",
            "bring {thing} to the {place}",
        ),
        (
            "slide {thing} into the {place}",
            "take {thing} to the {place}",
            "place {thing} in the {place}",
        ),
        (
            "let {thing} move to the {place}",
            "bring {thing} into the {place}",
            "I want {thing} to be at the {place}",
        ),
    ),
    "ground": Wording(
        (
            "make the background {colour}",
            "change the background to {colour}",
            "turn the background {colour}",
            "paint the background {colour}",
            "set the background to {colour}",
            "the background should be {colour}",
            "give the picture a {colour} background",
            "change the colour of the background to {colour}",
            "I want a {colour} background",
            "replace the background with {colour}",
        ),
        (
            "paint the background in {colour}",
            "I want the background {colour}",
            "put a {colour} background into the picture",
        ),
        (
            "I want the background in {colour}",
            "let the background be {colour}",
            "change the background into {colour}",
            "use {colour} in the background",
        ),
    ),
    "gradient": Wording(
        (
            "make the background a gradient from {colour} to {second}",
            "change the background to a gradient from {colour} to {second}",
            "turn the background into a gradient from {colour} to {second}",
            "give the picture a background gradient from {colour} to {second}",
            "paint a gradient from {colour} to {second} in the background",
            "the background should be a gradient from {colour} to {second}",
            "I want a background gradient from {colour} to {second}",
            "set the background to a gradient from {colour} to {second}",
        ),
        (
            "replace the background with a gradient from {colour} to {second}",
            "I want the background to be a gradient from {colour} to {second}",
        ),
        (
            "let the background be a gradient from {colour} to {second}",
            "I want a gradient from {colour} to {second} in the background",
        ),
    ),
    "swap": Wording(
        (
            "swap the colours of {thing} and {other}",
            "exchange the colours of {thing} and {other}",
            "switch the colours of {thing} and {other}",
            "let {thing} and {other} swap colours",
            "{thing} and {other} should swap their colours",
            "swap colours between {thing} and {other}",
            "make {thing} and {other} exchange colours",
            "I want the colours of {thing} and {other} swapped",
        ),
        ("exchange colours between {thing} and {other}", "let {thing} and {other} switch colours"),
        (
            "let the colours of {thing} and {other} be swapped",
            "I want {thing} and {other} to swap colours",
        ),
    ),
    "grayscale": Wording(
        (
            "make the picture grayscale",
            "convert the image to grayscale",
            "turn the picture gray",
            "make it black and white",
            "turn everything black and white",
            "remove all colour",
            "desaturate the image",
            "change the picture to grayscale",
            "I want a black and white picture",
            "make the image monochrome",
        ),
        ("convert it to black and white", "turn the image monochrome", "desaturate everything"),
        (
            "turn the picture black and white",
            "I want it monochrome",
            "show the picture in gray",
        ),
    ),
    "invert": Wording(
        (
            "invert the colours",
            "invert the picture",
            "invert all colours",
            "make a negative of the image",
            "turn the picture into a negative",
            "show the negative",
            "change the image to its negative",
            "invert everything",
        ),
        ("invert the colours of the image", "make the picture a negative"),
        (
            "turn it into a negative",
            "I want a negative of the picture",
        ),
    ),
    "brighten": Wording(
        (
            "brighten the picture",
            "make the picture brighter",
            "make everything lighter",
            "make it brighter",
            "increase the brightness",
            "brighten everything",
            "the image should be brighter",
            "lighten the image",
            "I want the picture brighter",
        ),
        ("make the image lighter", "increase the brightness of the picture"),
        (
            "lighten the picture",
            "let the picture be brighter",
            "I want it lighter",
        ),
    ),
    "darken": Wording(
        (
            "darken the picture",
            "make the picture darker",
            "make everything darker",
            "make it darker",
            "decrease the brightness",
            "darken everything",
            "the image should be darker",
            "dim the image",
            "I want the picture darker",
        ),
        (
            "decrease the brightness of the image",
            "turn the brightness down",
        ),
        (
            "dim everything",
            "let the image be darker",
            "I want it darker",
        ),
    ),
    "blur": Wording(
        (
            "blur the picture",
            "make the image blurry",
            "blur everything",
            "make it blurry",
            "soften the image",
            "the picture should be blurred",
            "add blur to the image",
            "apply a blur",
            "make everything soft and blurry",
        ),
        (
            "apply blur to the picture",
            "let everything be blurry",
        ),
        (
            "let the picture be blurry",
            "make the picture soft",
            "I want it blurred",
        ),
    ),
    "mirror": Wording(
        (
            "mirror the picture",
            "flip the picture horizontally",
            "mirror the image from left to right",
            "flip it horizontally",
            "swap left and right",
            "mirror everything",
            "make a mirror image",
            "exchange left and right",
        ),
        (
            "mirror it",
            "switch left and right",
            "flip everything horizontally",
        ),
        (
            "flip the picture from left to right",
            "let left and right swap",
        ),
    ),
    "flip": Wording(
        (
            "flip the picture vertically",
            "turn the picture upside down",
            "flip it vertically",
            "flip the image upside down",
            "swap top and bottom",
            "make it upside down",
            "exchange top and bottom",
            "turn everything upside down",
        ),
        (
            "turn it upside down",
            "switch top and bottom",
            "flip everything vertically",
        ),
        (
            "flip the picture from top to bottom",
            "let top and bottom swap",
        ),
    ),
    "outline": Wording(
        (
            "outline {thing} in {colour}",
            "give {thing} a {colour} outline",
            "add a {colour} outline to {thing}",
            "draw a {colour} outline around {thing}",
            "put a {colour} border around {thing}",
            "draw a {colour} border around {thing}",
            "{thing} should have a {colour} outline",
            "I want {thing} outlined in {colour}",
            "add a {colour} border to {thing}",
        ),
        ("give {thing} a {colour} border", "put a {colour} outline around {thing}"),
        (
            "let {thing} have a {colour} outline",
            "I want {thing} with a {colour} border",
            "make a {colour} outline around {thing}",
        ),
    ),
    "insert": Wording(
        (
            "put the shape of picture 2 into the {place} of picture 1",
            "add the shape from picture 2 at the {place} of picture 1",
            "place the shape of picture 2 at the {place} of picture 1",
            "copy the shape of picture 2 to the {place} of picture 1",
            "take the shape from picture 2 and put it at the {place}",
            "insert the object of picture 2 at the {place} of picture 1",
            "add the object from picture 2 to the {place}",
            "put the object of picture 2 at the {place}",
        ),
        (
            "copy the object from picture 2 to the {place} of picture 1",
            "put the shape from picture 2 at the {place} of picture 1",
        ),
        (
            "put the object from picture 2 into the {place} of picture 1",
            "I want the shape of picture 2 at the {place} of picture 1",
        ),
    ),
    "palette": Wording(
        (
            "use the colours of picture 2",
            "give picture 1 the colours of picture 2",
            "recolour picture 1 with the colours of picture 2",
            "take the colours from picture 2",
            "apply the colours of picture 2 to picture 1",
            "paint picture 1 in the colours of picture 2",
            "change the colours to those of picture 2",
            "make picture 1 use the colours of picture 2",
        ),
        ("use the colours from picture 2", "paint everything in the colours of picture 2"),
        (
            "I want the colours of picture 2",
            "set the colours to those of picture 2",
        ),
    ),
}

# Before the sentence, sometimes. The other spellings of a word, sometimes.
OPENINGS = ("please ", "now ", "could you ")
SPELLINGS = {
    "colour": "color",
    "colours": "colors",
    "recolour": "recolor",
    "gray": "grey",
    "grayscale": "greyscale",
    "centre": "middle",
    "picture": "image",
}
