"""ShopWorld's catalog: departments, categories, product types, attributes, brands and needs.

Everything is lower case. Each innermost mapping goes from a canonical name to the synonyms that
shoppers and sellers use for it.
"""

# Department -> category -> product type -> synonyms.
DEPARTMENTS: dict[str, dict[str, dict[str, tuple[str, ...]]]] = {
    "footwear": {
        "sport shoes": {
            "running shoes": ("running trainers", "jogging shoes"),
            "trail shoes": ("off road shoes",),
            "tennis shoes": ("court shoes",),
            "football boots": ("soccer cleats",),
        },
        "boots": {
            "ankle boots": ("booties",),
            "hiking boots": ("trekking boots", "walking boots"),
            "rain boots": ("wellies",),
        },
        "open shoes": {
            "sandals": ("strappy shoes",),
            "flip flops": ("thongs",),
            "slippers": ("house shoes",),
        },
    },
    "clothing": {
        "outerwear": {
            "jacket": ("windbreaker",),
            "parka": ("winter coat",),
            "gilet": ("body warmer", "vest"),
        },
        "legwear": {
            "jeans": ("denims",),
            "chinos": ("khakis",),
            "leggings": ("tights",),
            "shorts": ("bermudas",),
        },
        "tops": {
            "t shirt": ("tee",),
            "hoodie": ("hooded sweatshirt",),
            "jumper": ("sweater", "pullover"),
        },
    },
    "home": {
        "seating": {
            "sofa": ("couch", "settee"),
            "armchair": ("lounge chair",),
            "recliner": ("reclining chair",),
            "bar stool": ("counter stool",),
        },
        "tables": {
            "coffee table": ("cocktail table",),
            "dining table": ("kitchen table",),
            "desk": ("writing table",),
        },
        "lighting": {
            "floor lamp": ("standing lamp",),
            "table lamp": ("bedside lamp",),
            "pendant light": ("hanging lamp",),
        },
    },
    "electronics": {
        "phone gear": {
            "phone case": ("phone cover",),
            "screen protector": ("screen guard",),
            "phone charger": ("charging plug",),
        },
        "audio": {
            "headphones": ("headset", "over ear phones"),
            "earbuds": ("in ear phones",),
            "speaker": ("sound box",),
        },
        "desk gear": {
            "keyboard": ("typing board",),
            "mouse": ("computer mouse",),
            "webcam": ("web camera",),
        },
    },
    "kitchen": {
        "cookware": {
            "frying pan": ("skillet",),
            "saucepan": ("sauce pot",),
            "wok": ("stir fry pan",),
            "stock pot": ("soup pot",),
        },
        "appliances": {
            "kettle": ("water boiler",),
            "toaster": ("bread toaster",),
            "blender": ("smoothie maker",),
        },
        "storage": {
            "lunch box": ("bento box",),
            "food jar": ("pantry jar",),
            "bread bin": ("bread box",),
        },
    },
}

# Value -> synonyms.
_COLORS = {
    "red": ("crimson", "scarlet"),
    "blue": ("navy", "azure"),
    "green": ("olive",),
    "black": ("jet",),
    "white": ("ivory",),
    "grey": ("charcoal",),
    "brown": ("tan",),
    "pink": ("rose",),
}
_AUDIENCE = {"men": ("mens",), "women": ("ladies", "womens"), "kids": ("children",)}

# Department -> attribute -> value -> synonyms.
ATTRIBUTES: dict[str, dict[str, dict[str, tuple[str, ...]]]] = {
    "footwear": {
        "colour": _COLORS,
        "material": {"leather": ("cowhide",), "suede": (), "canvas": ("cloth",), "rubber": ()},
        "audience": _AUDIENCE,
        "size": {f"size {n}": () for n in (6, 7, 8, 9, 10)},
        "sole": {"arch support": ("arch insole",), "flat sole": ("zero drop",)},
        "fit": {"wide fit": ("roomy fit",), "narrow fit": ("slim fit",)},
    },
    "clothing": {
        "colour": _COLORS,
        "material": {"cotton": (), "wool": ("merino",), "polyester": ("poly",), "linen": ("flax",)},
        "audience": _AUDIENCE,
        "size": {"small": (), "medium": (), "large": (), "extra large": ()},
        "warmth": {"insulated": ("padded",), "breathable": ("airy",)},
    },
    "home": {
        "colour": _COLORS,
        "material": {"oak": (), "metal": ("iron",), "velvet": ("plush",), "rattan": ("wicker",)},
        "build": {"foldable": ("folding",), "fixed": ("rigid",)},
        "care": {"scratch proof": ("claw proof",), "delicate": ("gentle care",)},
    },
    "electronics": {
        "colour": _COLORS,
        "compatibility": {
            "iphone": ("ios",),
            "galaxy": ("samsung",),
            "pixel": (),
            "laptop": ("pc",),
        },
        "connection": {"wireless": ("bluetooth",), "wired": ("corded",)},
        "noise": {"noise cancelling": ("anc",), "open sound": ("ambient sound",)},
    },
    "kitchen": {
        "colour": _COLORS,
        "material": {"steel": ("inox",), "ceramic": ("stoneware",), "copper": (), "plastic": ()},
        "size": {"one litre": ("1l",), "two litre": ("2l",), "five litre": ("5l",)},
        "washing": {"dishwasher safe": ("machine washable",), "hand wash": ("wash by hand",)},
    },
}

# Further attributes of worlds with checks, in the form of ATTRIBUTES.
_PATTERN = {"striped": ("stripy",), "dotted": ("spotted",), "floral": ("flowery",)}
_CLOSURE = {"laced": ("lace up",), "zipped": ("zip up",), "velcro": ()}
_WEATHER = {"waterproof": ("watertight",), "windproof": (), "reflective": ("hi vis",)}
_FINISH = {"matt": ("dull",), "glossy": ("shiny",), "brushed": ()}
_STYLE = {"modern": ("contemporary",), "vintage": ("retro",), "rustic": ("farmhouse",)}
_SHAPE = {"round": ("circular",), "square": (), "oval": ()}
_STATE = {"new": ("unused",), "used": ("preowned",), "refurbished": ("renewed",)}

DETAILS: dict[str, dict[str, dict[str, tuple[str, ...]]]] = {
    "footwear": {
        "closure": _CLOSURE,
        "lining": {"fleece": ("fleecy",), "mesh": (), "felt": ()},
        "pattern": _PATTERN,
    },
    "clothing": {
        "closure": _CLOSURE,
        "cut": {"loose": ("baggy",), "fitted": ("snug",), "straight": ()},
        "pattern": _PATTERN,
        "weather": _WEATHER,
    },
    "home": {
        "finish": _FINISH,
        "style": _STYLE,
        "shape": _SHAPE,
        "pattern": _PATTERN,
        "room": {"office": ("workplace",), "bedroom": (), "patio": ("terrace",)},
    },
    "electronics": {
        "finish": _FINISH,
        "power": {"solar": (), "battery": (), "mains": ()},
        "port": {"usb": (), "lightning": (), "aux": ()},
        "weather": {"waterproof": ("watertight",), "dustproof": (), "shockproof": ("rugged",)},
        "state": _STATE,
    },
    "kitchen": {
        "finish": _FINISH,
        "style": _STYLE,
        "shape": _SHAPE,
        "pattern": _PATTERN,
        "state": _STATE,
    },
}

# Attributes some of whose values are substitutes for each other in worlds with checks.
SUBSTITUTED = (
    "brand",
    "colour",
    "material",
    *("closure", "lining", "pattern", "cut", "weather", "finish", "style", "shape", "room"),
)

# Department -> a need a shopper may name -> (attribute, the value that satisfies it).
NEEDS: dict[str, dict[str, tuple[str, str]]] = {
    "footwear": {
        "flat feet": ("sole", "arch support"),
        "barefoot style": ("sole", "flat sole"),
        "broad feet": ("fit", "wide fit"),
    },
    "clothing": {
        "freezing days": ("warmth", "insulated"),
        "hot summers": ("warmth", "breathable"),
    },
    "home": {
        "tiny flats": ("build", "foldable"),
        "cat owners": ("care", "scratch proof"),
    },
    "electronics": {
        "loud trains": ("noise", "noise cancelling"),
        "cyclists in traffic": ("noise", "open sound"),
        "tangle haters": ("connection", "wireless"),
    },
    "kitchen": {
        "people who hate washing up": ("washing", "dishwasher safe"),
        "a single person": ("size", "one litre"),
        "big families": ("size", "five litre"),
    },
}

# Department -> brand -> price band: 0 budget, 1 mid, 2 premium.
BANDS = ("budget", "mid", "premium")
BRANDS: dict[str, dict[str, int]] = {
    "footwear": {"velora": 2, "strado": 2, "kinto": 1, "marlow": 1, "pacer": 0, "solido": 0},
    "clothing": {"aldine": 2, "norrin": 2, "tessel": 1, "brisk": 1, "plainly": 0, "cozzo": 0},
    "home": {"halden": 2, "oriel": 2, "nestor": 1, "lumo": 1, "basica": 0, "flatto": 0},
    "electronics": {"zenix": 2, "auron": 2, "tekla": 1, "volta": 1, "gizmo": 0, "plugz": 0},
    "kitchen": {"cuivre": 2, "sabaton": 2, "morsel": 1, "panna": 1, "potto": 0, "simmer": 0},
}
