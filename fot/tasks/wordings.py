"""The wordings of synthetic retrieval: kinds of facts, each with many ways to state it and to ask for it.

A fact is (entity, relation, value): Anna Berg's garage opens with 4821. A *template* is a string with the slots
``{e}`` entity, ``{r}`` relation, ``{v}`` value, ``{E}`` and ``{R}`` the first two with a capital letter, ``{u}`` both
as a CONSTANT_NAME and ``{stamp}`` a moment in a log. A *pattern* draws words: ``{noun}`` is one of ``WORDS["noun"]``
(``{Noun}`` with a capital letter), a run of "#" a number of that many digits, " | " parts choices.

What the passkey test says (``fot/evaluation/passkey.py``) stays out, and so do the subjects of
``fot.evaluation.needles``: results on them are zero-shot. ``forbidden`` finds the former in any text.
"""

import random
import re
from dataclasses import dataclass

from fot.tasks.words import WORDS

FORBIDDEN = re.compile(
    r"pass[\s_-]*key|remember it|the grass is green|the sky is blue|the sun is yellow|here we go|there and back again"
    r"|important info|quiz you"
    # The sentence shapes of its needle and its question, whatever they are about.
    r"|\bthe ([^.?\n]{1,60}) is ([^.?\n]{1,40})\.[^\n]{0,60}\b\2 is the \1\b|what is ([^?\n]{1,60})\?\s+\3 is",
    re.IGNORECASE,
)


def forbidden(text: str) -> str | None:
    """What ``text`` has of the passkey test's words or sentence shapes, or None."""
    found = FORBIDDEN.search(text)
    return found.group() if found else None


@dataclass(frozen=True)
class Kind:
    """One kind of fact.

    Attributes:
        name: what it is called in reports.
        entity: pattern of what a fact is about. Kinds with the same pattern share entities, as distractors need.
        relations: what is told of an entity.
        value: pattern of the answer.
        statements: templates that tell the fact; each names entity, relation (or what implies it) and value.
        questions: templates that ask and answer; ``{v}`` stands once, and all that it takes stands before it.
    """

    name: str
    entity: str
    relations: tuple[str, ...]
    value: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]


# Templates that ask in words, and the question in them.
_ASKING = re.compile(r"(?:Q: |Question: |# )?(.+?)(?: Answer: |\nA: |\nAnswer: )[\"']?\{v\}[\"'.]*", re.DOTALL)


def chat_turns(kind: Kind) -> tuple[list[str], list[str]]:
    """Templates of what a user asks about such a fact, and of whole sentences that answer; either may be empty."""
    asked = [found.group(1) for template in kind.questions if (found := _ASKING.fullmatch(template))]
    sentences = [template for template in kind.questions if re.fullmatch(r"[^?:\"#$=>\n]+\{v\}\.", template)]
    return asked, sentences


def draw(pattern: str, rng: random.Random) -> str:
    """Text of one of the pattern's choices, each as likely.

    >>> draw("{adjective} {noun} | ###", random.Random(0))
    'young chair'
    """

    def pick(slot: re.Match[str]) -> str:
        if name := slot.group(1):
            word = draw(rng.choice(WORDS[name.lower()]), rng)
            return word.capitalize() if name[0].isupper() else word
        length = len(slot.group())
        return str(rng.randrange(10 ** (length - 1), 10**length))  # no leading zero

    return re.sub(r"\{(\w+)\}|#+", pick, rng.choice(pattern.split(" | ")))


def render(template: str, entity: str, relation: str, value: str, rng: random.Random) -> str:
    """The template with its slots filled."""
    return template.format(
        e=entity,
        r=relation,
        v=value,
        E=entity[:1].upper() + entity[1:],
        R=relation[:1].upper() + relation[1:],
        u=f"{entity}_{relation}".upper(),
        stamp=draw("20##-{month}-{day} {hour}:{sixty}:{sixty}", rng),
    )


# "==" name and pattern of the entity, "%" relations, "=" pattern of the value, "+" statements, "?" questions;
# "¶" is a line break, " | " parts templates.
_KINDS = r"""
== access code: {person}
% locker, garage, safe, bicycle lock, front door, suitcase, cellar, letter box, tool shed, office, gate, boathouse
= ### | #### | ##### | ######
+ The code of {e}'s {r} is {v}. | {e} opens the {r} with {v}. | To open the {r} of {e}, dial {v}.
+ {v} is the combination for {e}'s {r}. | {R} code, {e}: {v} | Type {v} and the {r} that belongs to {e} opens.
+ {e} set the combination of the {r} to {v} this morning. | "My {r} code is {v}," {e} said, "write it down!"
+ Nobody but {e} knew that the {r} opened with {v}. | owner={e}; lock={r}; code={v}
? What is the code of {e}'s {r}? Answer: {v}. | Q: Which combination opens the {r} of {e}?¶A: {v}
? The code of {e}'s {r} is {v}. | To get into {e}'s {r}, type {v}. | Question: {e}'s {r} code?¶Answer: {v}
? {e} opens the {r} with {v}. | "How does one open the {r} of {e}?" "The code is {v}." | {R} code, {e}: {v}
== record number: {person}
% order, invoice, ticket, reservation, membership, claim, parcel, policy, licence, contract, case, permit
= #### | ##### | ###### | ####### | {letter}{letter}-#### | {letter}{letter}{letter}####
+ {e}'s {r} number is {v}. | The {r} of {e} was filed under {v}. | {R} no. {v} ({e}) | {e} has {r} number {v}.
+ We gave {e} the {r} number {v}. | {v}: that is the {r} number of {e}. | On the {r} of {e} one reads the number {v}.
+ {r}: {v}, customer: {e} | Dear {e}, your {r} number is {v}.
? What is {e}'s {r} number? Answer: {v}. | The {r} number of {e} is {v}. | {e}'s {r} was filed under {v}.
? Q: Under which number do we find the {r} of {e}?¶A: {v} | customer: {e}, {r}: {v} | Dear {e}, your {r} number is {v}.
? Please look up the {r} of {e}: its number is {v}.
== meeting time: {person}
% dentist appointment, piano lesson, haircut, job interview, eye test, train, flight, swimming class, rehearsal
= {hour}:{sixty}
+ The {r} of {e} is at {v}. | {e} has a note on the fridge: {r}, {v}. | At {v} {e} must leave for the {r}.
+ {e}'s {r} was moved to {v}. | Calendar: {v} {r} ({e}) | "Don't be late, {e}! Your {r} is at {v}."
+ {v} is when the {r} of {e} begins. | They agreed on {v} for {e}'s {r}. | - {r} ({e}) {v}
? When is {e}'s {r}? Answer: {v}. | The {r} of {e} is at {v}. | {e}'s {r} begins at {v}.
? Q: At what time is the {r} of {e}?¶A: {v} | "Your {r}, {e}, is at {v}." | Calendar of {e}: {r}, {v}
? Question: {e}'s {r}, what time?¶Answer: {v}
== price: {thing}
% price, deposit, repair cost, insured value, shipping fee, weekly rent, cleaning charge, tax
= $##.{digit}{digit} | £#.{digit}{digit} | €###.{digit}{digit} | ## dollars | ### crowns | #### euros
+ The {r} of {e} is {v}. | For {e} the {r} comes to {v}. | {E}: {r} {v} | They set the {r} for {e} at {v}.
+ {v} was the {r} of {e}. | {E} has a {r} of {v}. | According to the catalogue, the {r} of {e} is {v}.
+ As to {e}, we settled on {v} for the {r}. | item = "{e}", {r} = {v} | The label on {e} gave {v} as its {r}.
? How high is the {r} of {e}? Answer: {v}. | The {r} of {e} is {v}. | For {e} the {r} comes to {v}.
? Q: What {r} does {e} have?¶A: {v} | {E}: {r} {v} | item = "{e}", {r} = {v}
? "And the {r} of {e}?" "That would be {v}."
== colour: {person}
% bicycle, umbrella, winter coat, front door, car, scarf, rucksack, teapot, boat, hat, sofa, notebook, tent
= {colour} | dark {colour} | light {colour} | {colour} and {colour}
+ {e}'s {r} is {v}. | {e} painted the {r} {v}. | The {r} that belongs to {e} is {v}. | {R} of {e}: {v}
+ Everyone knows the {r} of {e} by its colour, {v}. | {e} wanted the {r} in {v}, and got it.
+ "I like {v}," said {e}, and chose the {r} in that colour. | {v} is the colour of {e}'s {r}.
? What colour is {e}'s {r}? Answer: {v}. | The {r} of {e} is {v}. | The colour of {e}'s {r} is {v}.
? Q: In which colour did {e} choose the {r}?¶A: {v} | {R} of {e}: {v} | Look at the {r} of {e}. Its colour: {v}
== owner: {thing}
% owner, buyer, finder, seller, maker, keeper, donor, restorer, thief, heir
= {first} {last}
+ The {r} of {e} is {v}. | {v} is known as the {r} of {e}. | {E} ({r}: {v}) | {R} of {e}: {v}
+ The papers name {v} as the {r} of {e}. | As for {e}, its {r} was {v}. | {v}, the {r} of {e}, was not at home.
+ It took years to learn that {e} had {v} for its {r}. | object: {e}; {r}: {v}
? Who is the {r} of {e}? Answer: {v}. | The {r} of {e} is {v}. | {R} of {e}: {v} | As for {e}, its {r} was {v}.
? Q: Name the {r} of {e}.¶A: {v} | According to the papers, the {r} of {e} is called {v}. | object: {e}; {r}: {v}
== invented land: {Syllable}{syllable}{syllable} | {Syllable}{syllable}ia
% capital, main port, largest lake, longest river, highest mountain, oldest city, currency, ruling house
= {Syllable}{syllable} | {Syllable}{syllable}{syllable}
+ The {r} of {e} is {v}. | {e} has {v} for its {r}. | {v} is the {r} of {e}. | In {e}, the {r} is called {v}.
+ Travellers to {e} soon hear of {v}, its {r}. | {e} ({r}: {v}) | Every child in {e} learns that {v} is the {r}.
+ The atlas gives {v} as the {r} of {e}. | {R} of {e}: {v}
? What is {e}'s {r}? Answer: {v}. | The {r} of {e} is {v}. | In {e}, the {r} is called {v}. | {R} of {e}: {v}
? Q: Name the {r} of {e}.¶A: {v} | The atlas lists {e} with the {r} {v}. | {e} is a land whose {r} is {v}.
== number in code: {section}
% timeout, max_retries, batch_size, port, buffer_limit, max_depth, page_size, cache_size, num_workers, interval
% warmup_steps, seed, queue_length, max_rows, chunk_bytes, pool_size, ttl, backlog, quota, threshold
= # | ## | ### | #### | ##### | ######
+ {u} = {v} | {u}: int = {v} | #define {u} {v} | const {u} = {v}; | {e}.{r} = {v} | export {u}={v}
+ self.{e}_{r} = {v}  # measured | parser.add_argument("--{e}-{r}", type=int, default={v})
+ def {e}_{r}():¶    return {v} | {e} = Config({r}={v}) | # {r} of {e} is {v}, see above
? assert {u} == {v} | assert config.{e}.{r} == {v} | # {u} is {v} | print({e}.{r})  # prints {v} | >>> {e}.{r}¶{v}
? if {u} != {v}: | The value of {e}.{r} is {v}. | # What is {u}? Answer: {v}
== text in code: {section}
% name, mode, backend, label, prefix, channel, profile, region, topic, user, branch, theme
= {adjective}-{noun} | {noun} | {noun}_## | {adjective}_{noun}
+ {u} = "{v}" | {u}: str = "{v}" | let {u} = "{v}"; | {e}.{r} = "{v}" | export {u}="{v}" | {e}.set("{r}", "{v}")
+ {e} = build({r}="{v}") | # the {r} of {e} is "{v}" | static const char *{u} = "{v}";
? assert {u} == "{v}" | assert config.{e}.{r} == "{v}" | # {u} is "{v}" | print({e}.{r})  # prints "{v}"
? >>> {e}.{r}¶'{v}' | {e}.get("{r}") returns "{v}" | # What is {u}? Answer: "{v}"
== configuration: {section}
% timeout, max_retries, batch_size, port, buffer_limit, max_depth, page_size, cache_size, num_workers, interval
% warmup_steps, seed, queue_length, max_rows, chunk_bytes, pool_size, ttl, backlog, quota, threshold
= ## | ### | #### | ##### | {adjective}-{noun}
+ [{e}]¶{r} = {v} | {e}:¶  {r}: {v} | {{"{e}": {{"{r}": "{v}"}}}} | {e}.{r}: {v} | <{e} {r}="{v}"/> | {u}={v}
+ "{e}/{r}": "{v}", | set {e} {r} {v} | --{e}-{r}={v} | {e} {{¶  {r} {v};¶}}
? [{e}]¶{r} = {v} | {e}:¶  {r}: {v} | {{"{e}": {{"{r}": "{v}"}}}} | {u}={v} | "{e}/{r}": "{v}",
? $ config get {e}.{r}¶{v} | In the configuration, {r} of {e} is {v}.
== log line: {module}-# | {module}-##
% exit code, latency, retries, open files, free blocks, dropped packets, pid, queue size, rows written, checksum
= # | ## | ### | #### | ##### | ######
+ {stamp} INFO {e}: {r} {v} | [{stamp}] {e} {r}={v} | {stamp} WARN {r} of {e} is now {v} | {e}> {r}: {v}
+ {{"time": "{stamp}", "host": "{e}", "{r}": {v}}} | {stamp} {e} reports {v} as {r} | {e} stopped with {r} {v}
+ DEBUG:{e}:{r} was {v} at {stamp}
? Which {r} did {e} report? Answer: {v}. | {e} reported this {r}: {v} | The log says: {e}, {r} {v}
? Q: {r} of {e}?¶A: {v} | $ last {e} "{r}"¶{v} | {{"host": "{e}", "{r}": {v}}}
== date: {person}
% wedding, exam, move, lease, visa, driving test, first concert, graduation, trial, retirement, book launch
= 1# {monthname} 19## | {monthname} #, 20## | 20##-{month}-{day} | {day}/{month}/18## | # {monthname}
+ The date of {e}'s {r} is {v}. | {e}: {r} on {v} | {v} was the day of {e}'s {r}. | {R} ({e}): {v}
+ {e} looked forward to {v}, the day of the {r}. | For the {r} of {e} they chose {v}.
+ In the diary of {e}, {v} is marked with the word "{r}". | "My {r} is on {v}," wrote {e}.
? When is the {r} of {e}? Answer: {v}. | The {r} of {e} is on {v}. | {R} ({e}): {v} | {e}: {r} on {v}
? Q: On which day is {e}'s {r}?¶A: {v} | For the {r} of {e} they chose {v}. | The date of {e}'s {r} is {v}.
== favourite food: {person}
% breakfast, lunch, dinner, picnic dish, Sunday dish, midnight snack, feast dish
= {ingredient} {dish} | {ingredient} and {ingredient} {dish} | {adjective} {ingredient} {dish}
+ {e}'s favourite {r} is {v}. | For {r}, {e} likes {v} more than anything. | {v} is the {r} that {e} loves most.
+ Give {e} {v} for {r} and all is well. | {e} never tires of {v} as a {r}. | Favourite {r} of {e}: {v}
+ "No {r} like {v}!" said {e}. | The cook knew that {e} prefers {v} as {r}.
? What is {e}'s favourite {r}? Answer: {v}. | The favourite {r} of {e} is {v}. | For {r}, {e} likes {v}.
? Q: What does {e} like most as a {r}?¶A: {v} | Favourite {r} of {e}: {v} | As {r}, the cook gave {e} {v}.
== password: {person}
% laptop, tablet, wireless network, mail account, cloud drive, game console, alarm, printer, bank app
= {secret}
+ The password of {e}'s {r} is {v}. | {e} logs in to the {r} with {v}. | {R} password ({e}): {v}
+ {v} unlocks the {r} of {e}. | "{v}", typed {e}, and the {r} came to life. | user={e} device={r} password={v}
+ On a note under the {r} of {e} stood the password: {v} | {e} changed the password of the {r} to {v}.
? What is the password of {e}'s {r}? Answer: {v} | The password of {e}'s {r} is {v}. | {R} password ({e}): {v}
? Q: How does {e} log in to the {r}?¶A: {v} | {e} logs in to the {r} with {v} | user={e} device={r} password={v}
== temperature: {place}
% dawn, noon, dusk, midnight, lunchtime, closing time
= ## degrees | -## degrees | ##.{digit} degrees | -#.{digit}°C | ##.{digit}°C | 1## °F
+ At {r} the thermometer of {e} showed {v}. | {E}, {r}: {v} | It was {v} at {e} at {r}. | {E} has {v} at {r}.
+ They measured {v} at {r}, at {e}. | {v} at {r}: such is the climate of {e}. | temperature({e}, {r}) = {v}
+ The keeper of {e} wrote "{v}" into the book at {r}.
? How warm was it at {r} at {e}? Answer: {v}. | At {r} the thermometer of {e} showed {v}. | {E}, {r}: {v}
? Q: What was the temperature of {e} at {r}?¶A: {v} | The temperature of {e} at {r} was {v}.
? temperature({e}, {r}) = {v}
== bare number: {adjective} | {noun} | {adjective} {noun}
% number, code, figure, combination, count, score, index, serial
= # | ## | ### | #### | ##### | ###### | #######
+ The {e} {r} is {v}. | {v} is the {e} {r}. | Note: {e} {r} {v}. | We call {v} the {e} {r}. | {E} {r}: {v}
+ Keep the {e} {r} in mind, which is {v}. | Don't forget the {e} {r}, {v}! | As the {e} {r} we use {v}.
+ Here comes the {e} {r}: {v}. Once more, {v}. | If anyone asks for the {e} {r}, say {v}.
? What is the {e} {r}? Answer: {v}. | The {e} {r} is {v}. | Which {r} is the {e} one? It is {v}.
? Q: Tell me the {e} {r}.¶A: {v} | {E} {r}: {v} | As I said, the {e} {r} is {v}. | "The {e} {r}?" "It is {v}."
== code word: {adjective} | {noun} | {adjective} {noun}
% word, phrase, slogan, signal, codename, motto, nickname, answer
= {noun} | {adjective} {noun} | {adjective} {noun} | {noun} and {noun}
+ The {e} {r} is {v}. | The {e} {r} is "{v}". | "{v}" is our {e} {r}. | {E} {r}: {v} | Note the {e} {r}: {v}.
+ We use {v} as the {e} {r}. | When they ask for the {e} {r}, whisper "{v}". | By {v} we mean the {e} {r}.
? What is the {e} {r}? Answer: {v}. | The {e} {r} is {v}. | {E} {r}: {v} | The {e} {r} is "{v}".
? Q: Which {r} is the {e} one?¶A: {v} | We use this as the {e} {r}: {v} | "The {e} {r}, please." "It is {v}."
== pet: {person}
% dog, cat, parrot, pony, rabbit, hamster, goat, canary, tortoise, donkey
= {pet} | {pet} {last} | {first}
+ {e}'s {r} is called {v}. | {e} has a {r} named {v}. | {v} is the {r} of {e}. | {v}, said {e}, is my {r}'s name.
+ "Come here, {v}!" {e} called to the {r}. | The {r} of {e} answers to the name {v}. | {R} of {e}: {v}
+ {e} gave the {r} the name {v}. | On the collar of {e}'s {r} one could read "{v}".
? What is the name of {e}'s {r}? Answer: {v}. | {e}'s {r} is called {v}. | {R} of {e}: {v}
? Q: How does {e} call the {r}?¶A: {v} | The {r} of {e} answers to the name {v}. | {e} has a {r} named {v}.
== hiding place: {person}
% spare glasses, savings, diary, letters, chocolate, medal, map, photographs, ring, binoculars, receipts
= behind the {spot} | under the {spot} | inside the {spot} | next to the {spot} | behind the {colour} {spot}
+ {e} keeps the {r} {v}. | {e} hid the {r} {v}. | The {r} of {e}: look {v}.
+ Look {v} and there lies the {r} that {e} missed. | {e}'s {r}? Always {v}. | Nobody would look for the {r} of {e} {v}.
+ "I put my {r} {v}," {e} admitted. | It was {v} that {e} had hidden the {r}.
? Where does {e} keep the {r}? Answer: {v}. | {e} hid the {r} {v}. | To find the {r} of {e}, look {v}.
? Q: Where should one look for the {r} of {e}?¶A: {v} | The {r} of {e}: {v} | {e} keeps the {r} {v}.
== measure: {place}
% height, length, width, depth, weight, capacity, wall thickness
= ## | ### | #### | ## units | ### units | #### units
+ The {r} of {e} is {v}. | {E} has {v} as its {r}. | {E}: {r} {v} | The guide gives {v} for the {r} of {e}.
+ {v}, that is the {r} of {e}. | They put the {r} of {e} at {v}. | {r}({e}) = {v} | {R} of {e}: {v}
? What {r} does {e} have? Answer: {v}. | The {r} of {e} is {v}. | For {e} the {r} is {v}. | {r}({e}) = {v}
? Q: Give the {r} of {e}.¶A: {v} | {R} of {e}: {v} | The guide says of the {r} of {e}: {v}
== seat: {person}
% seat, desk, room, platform, gate, cabin, table, bunk, parking space, box
= # | ## | ### | #{letter} | ##{letter} | {letter}##
+ {e} has {r} {v}. | The {r} of {e} is {v}. | {R} {v} is reserved for {e}. | {e}, {r} {v} | {R}: {v} ({e})
+ They sent {e} to {r} {v}. | {v} is the {r} number that {e} got. | "You are at {r} {v}, {e}."
? Which {r} does {e} have? Answer: {v}. | The {r} of {e} is {v}. | {e} has {r} {v}. | {e}, {r} {v}
? Q: Where must {e} go? Say which {r}.¶A: {v} | For {e} they reserved {r} {v}.
== glossary: {syllable}{syllable} | {syllable}{syllable}{syllable}
% Velari, Oskan, Tormic, Belish, Quinnic, Zeldan, Fennish, Norrian
= {noun} | {adjective} {noun}
+ In {r}, "{e}" means {v}. | {e} ({r}): {v} | The {r} word {e} stands for {v}. | {r}: {e} = {v}
+ Speakers of {r} say "{e}" for {v}. | "{E}!" is {r} and means {v}. | dictionary["{r}"]["{e}"] = "{v}"
+ She explained that {e} is the {r} word for {v}.
? What does "{e}" mean in {r}? Answer: {v}. | In {r}, "{e}" means {v}. | {e} ({r}): {v} | {r}: {e} = {v}
? Q: Translate the {r} word {e}.¶A: {v} | The {r} word {e} stands for {v}.
== people: {person}
% teacher, lawyer, neighbour, cousin, boss, dentist, landlord, partner, coach, tailor, rival, gardener
= {first} {last} | {first}
+ {e}'s {r} is {v}. | The {r} of {e} is called {v}. | {v} is the {r} of {e}. | {R} of {e}: {v}
+ {e} wrote to {v}, the {r}. | {e} met {v}, who had become {e}'s {r}. | For years {v} had been {e}'s {r}.
+ "{v} is my {r}," said {e}.
? Who is {e}'s {r}? Answer: {v}. | The {r} of {e} is called {v}. | {e}'s {r} is {v}. | {R} of {e}: {v}
? Q: Name the {r} of {e}.¶A: {v} | {e} has a {r} by the name of {v}.
== stock: {place}
% candles, bolts, blankets, barrels, tickets, bricks, bottles, lamps, ropes, sacks, crates, tyres
= # | ## | ### | #### | #####
+ {E} holds {v} {r}. | There are {v} {r} in the stock of {e}. | {E}: {r} {v} | stock of {e}: {r}={v}
+ They counted the {r} of {e} and wrote down {v}. | {v} {r} were left at {e}. | {R} at {e}: {v}
+ As to {r}, {e} can deliver {v}.
? How many {r} does {e} hold? Answer: {v}. | The number of {r} at {e} is {v}. | {R} at {e}: {v}
? Q: Count the {r} of {e}.¶A: {v} | stock of {e}: {r}={v} | As to {r}, {e} can deliver {v}.
== journey: {person}
% summer holiday, honeymoon, sabbatical, school exchange, business trip, cruise, winter break, research year
= {country}
+ {e} spent the {r} in {v}. | {e} went to {v} for the {r}. | The {r} took {e} to {v}. | {R} of {e}: {v}
+ "{v} was wonderful," {e} wrote about the {r}. | {e} packed for {v}, where the {r} was to be.
+ It was in {v} that {e} spent the {r}. | {v}, that was where {e} had the {r}.
? Where did {e} spend the {r}? Answer: {v}. | {e} spent the {r} in {v}. | {R} of {e}: {v}
? Q: To which country did the {r} take {e}?¶A: {v} | For the {r} {e} went to {v}. | The {r} took {e} to {v}.
== occupation: {person}
% first job, day job, weekend job, trade, training, second career, dream
= {craft} | {adjective} {craft} | {craft} and {craft}
+ {e} is a {v} by {r}. | As to the {r} of {e}: {v}. | {v} is the {r} of {e}. | {R} of {e}: {v}
+ For the {r}, {e} chose to be a {v}. | "A {v}?" asked {e}. "That is my {r}!" | The {r} of {e} was that of a {v}.
+ The register has {e} as a {v} ({r}).
? What is {e}'s {r}? Answer: {v}. | {R} of {e}: {v} | The {r} of {e} was that of a {v}. | As to the {r} of {e}: {v}.
? Q: Which work is the {r} of {e}?¶A: {v} | The {r} of {e} is {v}.
== language: {person}
% at home, at work, at school, in dreams, in letters, on stage, with the children, at the market
= {tongue} | {tongue} and {tongue}
+ {e} speaks {v} {r}. | {v} is what {e} speaks {r}. | {e}, {r}: {v} | {R}, {e} speaks nothing but {v}.
+ One hears {e} speak {v} {r}. | "I use {v} {r}," said {e}. | {e} never spoke {v} but {r}.
+ {v}! Who would have thought that {e} used that {r}?
? Which language does {e} speak {r}? Answer: {v}. | {R}, {e} speaks {v}. | {e}, {r}: {v} | What {e} speaks {r} is {v}.
? Q: What does {e} speak {r}?¶A: {v} | {R} one hears {e} speak {v}.
== custom: {place}
% at dawn, at noon, in winter, on Sundays, on holidays, after dinner, before a storm, at full moon
= {chore} | {chore} and {chore} | {chore} behind the {spot} | {chore} next to the {spot}
+ At {e} they {v} {r}. | {R}, the people of {e} {v}. | The custom of {e} {r} is to {v}. | {E}, {r}: {v}
+ "We {v} {r}," said the people of {e}. | {R} all guests of {e} must {v}. | To {v} is what one does {r} at {e}.
+ The children of {e} know that {r} they will {v}.
? What do people do at {e} {r}? Answer: {v}. | The custom of {e} {r} is to {v}. | {E}, {r}: {v}
? Q: What must guests of {e} do {r}?¶A: {v} | {R}, the people of {e} {v}. | {R} at {e}, they {v}.
== reason: {person}
% concert, deadline, bus, dinner, parade, lecture, auction, ceremony, first lesson, ferry
= the {noun} was {trouble} | the {adjective} {noun} was {trouble} | a {noun} was {trouble}
+ {e} missed the {r} because {v}. | Because {v}, {e} missed the {r}. | The {r} began without {e}, as {v}.
+ "I could not come to the {r}," said {e}, "since {v}." | {e} (absent, {r}): {v} | {v}, so {e} missed the {r}.
+ {e} blamed the missed {r} on this: {v}. | They forgave {e} for missing the {r} when they heard that {v}.
? Why did {e} miss the {r}? Answer: {v}. | {e} missed the {r} because {v}. | {e} (absent, {r}): {v}
? Q: What kept {e} from the {r}?¶A: {v} | The {r} began without {e}, as {v}. | {e} blamed the missed {r} on this: {v}.
== function result: {verb}_{noun} | {verb}_{adjective}_{noun}
% red, left, north, spring, first, upper, fast, inner, odd, old
= ## | ### | #### | #####
+ {e}("{r}") == {v} | # {e}("{r}") gives {v} | >>> {e}("{r}")¶{v} | {e}: "{r}" -> {v} | assert {e}("{r}") == {v}
+ def {e}(kind="{r}"):¶    return {v} | The call {e}("{r}") returns {v}. | {e}.table["{r}"] = {v}
+ when(mock.{e}("{r}")).then_return({v})
? assert {e}("{r}") == {v} | # {e}("{r}") gives {v} | >>> {e}("{r}")¶{v} | result = {e}("{r}")  # {v}
? What does {e}("{r}") return? Answer: {v}. | The call {e}("{r}") returns {v}.
"""


def _kind(section: str) -> Kind:
    head, *lines = section.strip().splitlines()
    name, entity = head.split(": ")

    def marked(sign: str, parting: str) -> tuple[str, ...]:
        found = parting.join(line[2:].strip(" ") for line in lines if line[0] == sign)
        return tuple(part.replace("¶", "\n") for part in found.split(parting))

    value = " | ".join(marked("=", " | "))
    return Kind(name, entity, marked("%", ", "), value, marked("+", " | "), marked("?", " | "))


KINDS = tuple(_kind(section) for section in _KINDS.split("\n== ")[1:])
