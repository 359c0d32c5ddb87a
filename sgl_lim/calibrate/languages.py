"""A little prose in languages other than English, made from words: the same seed gives the same."""

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Language:
    """Words of one language; every actor can do every deed at every place and time."""

    times: tuple[str, ...]
    actors: tuple[str, ...]
    deeds: tuple[str, ...]
    places: tuple[str, ...]
    reasons: tuple[str, ...]
    form: str


LANGUAGES = (
    Language(
        ("Am frühen Morgen", "Nach dem Essen", "An jedem Markttag", "Im letzten Winter", "Kurz vor dem Regen"),
        ("der alte Müller", "die Lehrerin", "ein junger Schreiner", "die Nachbarin", "der Briefträger"),
        ("brachte", "suchte", "verkaufte", "fand", "reparierte"),
        ("im Hof hinter der Kirche", "auf der Brücke", "neben dem Brunnen", "in der Werkstatt", "am Rand des Waldes"),
        ("weil niemand Zeit hatte", "obwohl es schon spät war", "damit alle zufrieden waren", "bevor es dunkel wurde"),
        "{time} {deed} {actor} {place} etwas, {reason}.",
    ),
    Language(
        ("De bon matin", "Après le repas", "Chaque jour de marché", "L'hiver dernier", "Un peu avant la pluie"),
        ("le vieux meunier", "l'institutrice", "un jeune menuisier", "la voisine", "le facteur"),
        ("apportait du pain", "cherchait ses clés", "vendait des pommes", "lisait une lettre", "réparait une chaise"),
        ("dans la cour de l'église", "sur le pont", "près de la fontaine", "à l'atelier", "au bord de la forêt"),
        ("parce que personne n'avait le temps", "bien qu'il fût déjà tard", "avant que la nuit ne tombe"),
        "{time}, {actor} {deed} {place}, {reason}.",
    ),
    Language(
        ("Muy temprano", "Después de comer", "Cada día de mercado", "El invierno pasado", "Poco antes de la lluvia"),
        ("el viejo molinero", "la maestra", "un joven carpintero", "la vecina", "el cartero"),
        ("traía pan fresco", "buscaba sus llaves", "vendía manzanas", "leía una carta", "arreglaba una silla"),
        ("en el patio de la iglesia", "sobre el puente", "junto a la fuente", "en el taller", "al borde del bosque"),
        ("porque nadie tenía tiempo", "aunque ya era tarde", "antes de que cayera la noche"),
        "{time}, {actor} {deed} {place}, {reason}.",
    ),
    Language(
        ("清晨", "午饭以后", "每个集市日", "去年冬天", "下雨之前"),
        ("老磨坊主", "女老师", "年轻的木匠", "邻居", "邮递员"),
        ("带来了面包", "寻找钥匙", "卖苹果", "读了一封信", "修好了椅子"),
        ("在教堂的院子里", "在桥上", "在泉水旁边", "在作坊里", "在森林边上"),
        ("因为没有人有时间", "虽然已经很晚了", "好让大家都满意"),
        "{time},{actor}{place}{deed},{reason}。",
    ),
)
_SENTENCES = 12
"""In a text of one language."""


def texts(seed: str, count: int) -> list[str]:
    """So many texts, in one language after another."""
    return [_text(random.Random(f"{seed}/{n}"), LANGUAGES[n % len(LANGUAGES)]) for n in range(count)]


def _text(rng: random.Random, language: Language) -> str:
    sentences = (
        language.form.format(
            time=rng.choice(language.times),
            actor=rng.choice(language.actors),
            deed=rng.choice(language.deeds),
            place=rng.choice(language.places),
            reason=rng.choice(language.reasons),
        )
        for _ in range(_SENTENCES)
    )
    return " ".join(sentences) + "\n\n"
