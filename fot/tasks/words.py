"""The words that the patterns of ``fot.tasks.wordings`` draw from."""

WORDS: dict[str, list[str]] = {
    name: words.split()
    for name, words in {
        "first": """
Aaron Abel Ada Adele Agnes Alan Albert Alice Alma Amara Amir Amy Andre Anna Anton Arthur Asha Astrid Aurora Axel
Basil Beatrice Ben Bianca Boris Bruno Camille Carl Carmen Cecil Chen Clara Colin Cora Cyril Dana Daniel Daphne David
Deborah Dennis Diana Dora Edgar Edith Elena Eli Elsa Emil Emma Enzo Erik Esther Eva Fatima Felix Fiona Flora Frank
Freya Gabriel George Gina Grace Greta Gustav Hana Hannah Harold Hassan Hazel Hector Helen Henry Hilda Hugo Ian
Ibrahim Ida Igor Ines Ingrid Irene Isaac Ivan Ivy Jack Jamal James Jana Jasper Joan Joel Jonas Judith Julia Kai Karim
Karla Kenji Kira Lars Laura Lea Leo Lila Linus Lola Louis Lucy Luis Magda Marco Maria Marta Maya Mei Milan Mina Mona
Nadia Naomi Nico Nina Noah Nora Olga Oliver Omar Oscar Otto Pablo Paula Pedro Petra Pia Quentin Rafael Rita Rosa Ruth
Samir Sara Silvia Simon Sofia Stella Sven Tara Thea Theo Tilda Tom Uma Vera Victor Wanda Yara Yusuf Zoe""",
        "last": """
Abbott Adler Ahmed Alvarez Archer Bailey Baker Barnes Becker Bell Berg Bishop Black Blom Bond Booth Brandt Brook
Brown Burke Byrne Carter Castro Chan Clarke Cole Conti Cooper Costa Cruz Dahl Dalton Davis Delgado Dietz Doyle Duarte
Eastman Eklund Ellis Engel Evans Farmer Fischer Fisher Flynn Ford Foster Fox Frost Garcia Gibbs Gomez Gray Green
Gupta Haas Hale Hall Hansen Hardy Harper Hart Hayes Herman Hill Holm Holt Hoffman Hughes Hunt Ito Jansen Jensen
Jordan Kahn Kaplan Keller Kelly Khan Kim King Klein Knox Kovac Kumar Lane Larsen Leclerc Lee Lind Lopez Lund Marsh
Martin Mason Mehta Meyer Mills Moore Moreau Moss Murray Nash Nielsen Novak Nunez Olsen Ortega Osman Page Palmer Park
Patel Perez Porter Price Quinn Rao Reed Reyes Rivera Rossi Roth Ryan Santos Sato Sharp Shaw Silva Singh Stein Stone
Strand Suzuki Swift Tanaka Thorn Torres Vance Vargas Vogel Wagner Walsh Ward Weber Wells West Wolf Wong Yates Young
Zhang Zimmer""",
        "adjective": """
amber ancient bitter blue brave bright broken bronze calm clever cold copper crimson curved dark dusty eager early
empty faded fallen frozen gentle gilded golden green grey heavy hidden hollow humble iron ivory jagged jolly lazy
little lonely loud lucky mellow misty narrow nimble noble northern old orange pale patient plain polished proud
purple quick quiet rapid red restless round rusty sacred salty secret shallow sharp shiny silent silver simple sleepy
small smooth solid southern spare square steady stone striped sudden sunny tall thin tiny velvet violet warm
wandering western white wild windy winter wise wooden yellow young""",
        "noun": """
acorn anchor apple arrow badger barrel basket beacon bell bench bicycle blanket boat bottle bowl bracelet bridge
bucket button cabinet camera candle canoe carpet castle chair chessboard clock coat comet compass cradle cupboard
curtain desk diamond dolphin door drum eagle engine falcon feather fiddle flute fountain fox garden goblet guitar
hammer harbour harp hat helmet heron hill jacket jar kettle kite ladder lamp lantern lemon lion lute magnet maple map
mask medal mirror moon mountain necklace oak oven owl paddle painting panther pearl pebble piano pigeon pillow planet
plough quill rabbit radio raven ribbon river rocket rope rug saddle sailboat scarf ship shovel sledge sofa sparrow
spoon statue stove suitcase table teapot telescope tent thimble tiger tower trumpet turtle umbrella vase violin wagon
wallet watch willow window wolf""",
        "colour": """
beige black blue bronze brown crimson gold green grey indigo lilac maroon mauve navy olive orange pink plum purple
red rust scarlet silver teal turquoise violet white yellow""",
        "ingredient": """
almond apple barley beetroot cabbage carrot cherry chestnut chicken coconut cod fennel ginger leek lemon lentil
lobster mushroom onion peach pear pepper plum potato pumpkin rhubarb salmon spinach tomato trout walnut""",
        "dish": """
cake casserole chowder curry dumplings fritters gnocchi goulash noodles omelette pancakes pie porridge pudding rice
risotto salad soup stew tart""",
        "spot": """
bathtub bookcase chimney clock cupboard doormat drawer dresser flowerpot freezer mattress mirror piano radiator sofa
stove toolbox wardrobe""",
        "pet": """
Bandit Biscuit Boots Bubbles Captain Clover Cookie Dusty Fudge Juniper Marble Muffin Nugget Pickle Pumpkin Rascal
Rocket Scout Shadow Snowy Socks Sparky Tango Toffee Truffle Waffles Whiskers Ziggy""",
        "monthname": "January February March April May June July August September October November December",
        "syllable": """
ba bel bor cal cor da del dor el fa fen gal gor hal ish ka kel kor la lin lor ma mir mor na nel nor os pel quin ra
rin sa sel sor ta tar tel tor ul va vel vor wen yar za zel zor""",
        "module": """
archive billing client cluster compiler crawler database encoder exporter fetcher gateway importer indexer logger
mailer monitor notifier parser planner proxy queue renderer replica resolver router sampler scanner scheduler server
session storage stream sync tracker uploader watcher worker""",
        "verb": """
apply build check clean collect compute convert count decode drop fetch filter find flush guess load merge parse pick
read render scan score send split store trim update""",
        "country": """
Albania Argentina Armenia Bolivia Bulgaria Cambodia Chile Croatia Cyprus Ecuador Estonia Ethiopia Fiji Georgia Hungary
Iceland Indonesia Jamaica Japan Kenya Laos Lebanon Malta Mexico Mongolia Morocco Namibia Nepal Norway Oman Panama Peru
Romania Senegal Slovenia Tunisia Turkey Uganda Uruguay Vietnam""",
        "craft": """
baker barber beekeeper blacksmith bookbinder carpenter cartographer clockmaker diver editor electrician farmer florist
gardener glazier goldsmith interpreter jeweller librarian mechanic miller nurse optician painter pilot plumber potter
sailor shepherd surveyor tailor translator weaver welder""",
        "tongue": """
Albanian Arabic Basque Catalan Czech Danish Dutch Estonian Finnish Georgian Greek Hebrew Hindi Icelandic Irish Italian
Japanese Korean Latin Maltese Mongolian Norwegian Polish Romanian Swahili Swedish Tamil Thai Turkish Welsh""",
        "chore": """
bake-bread count-the-coins dance-in-circles feed-the-geese light-candles mend-old-nets play-chess polish-the-silver
read-aloud ring-the-bell roast-chestnuts sing-hymns sweep-the-stairs tell-riddles wash-the-windows whistle-softly""",
        "trouble": """
lost melted jammed stolen sold frozen rotten leaking missing cracked locked painted-over eaten-by-mice full-of-water
on-fire in-pieces upside-down""",
        "building": "bakery bridge canal cellar depot greenhouse mill observatory pier station tower tunnel workshop",
        "letter": " ".join("ABCDEFGHJKLMNPRSTUVWXYZ"),
        "symbol": " ".join("abcdefghijkmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789"),
        "digit": " ".join("0123456789"),
        "day": " ".join(f"{number:02}" for number in range(1, 29)),
        "month": " ".join(f"{number:02}" for number in range(1, 13)),
        "hour": " ".join(f"{number:02}" for number in range(24)),
        "sixty": " ".join(f"{number:02}" for number in range(60)),
    }.items()
}
for _name in ("chore", "trouble"):
    WORDS[_name] = [_words.replace("-", " ") for _words in WORDS[_name]]
WORDS["person"] = ["{first}", "{first} {last}", "{first} {last}"]
WORDS["thing"] = ["the {adjective} {noun}"]
WORDS["place"] = ["the {last} {building}"]
WORDS["section"] = ["{module}", "{noun}_{module}", "{adjective}_{module}"]
WORDS["secret"] = ["{symbol}" * length for length in (5, 6, 7, 8)]
