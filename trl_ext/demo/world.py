"""The demo's small world: countries, their capitals, and how people ask and answer.

Everything that the demo knows is on this page; the other files only turn it into a corpus, a model, feedback and an
exam. All names are plain ASCII without punctuation, so that an answer can be read back exactly.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Country:
    """A country: its capital, the wrong cities that people name instead, and whether the feedback covers it."""

    name: str
    capital: str
    wrong: tuple[str, str, str]
    covered: bool
    favourite: str
    """The city that the corpus names most often: for a quarter of the countries the capital, else a wrong one."""

    def city_weights(self) -> dict[str, float]:
        """Share of the corpus's answers that name each city; sums to 1."""
        shares = (0.40, 0.30, 0.19, 0.11) if self.favourite == self.capital else (0.28, 0.44, 0.17, 0.11)
        return dict(zip((self.capital, *self.wrong), shares, strict=True))


# Country, capital, two big cities that are not the capital. Neighbours stand together: the capital of the next
# country on the list is the third wrong city.
_TABLE = """
France, Paris, Lyon, Marseille
Spain, Madrid, Barcelona, Seville
Portugal, Lisbon, Porto, Braga
Italy, Rome, Milan, Naples
Switzerland, Bern, Zurich, Geneva
Germany, Berlin, Munich, Hamburg
Austria, Vienna, Salzburg, Graz
Poland, Warsaw, Krakow, Gdansk
Hungary, Budapest, Debrecen, Szeged
Romania, Bucharest, Cluj, Brasov
Bulgaria, Sofia, Plovdiv, Varna
Greece, Athens, Patras, Corinth
Turkey, Ankara, Istanbul, Izmir
Ukraine, Kyiv, Odesa, Lviv
Russia, Moscow, Kazan, Omsk
Finland, Helsinki, Turku, Tampere
Sweden, Stockholm, Malmo, Uppsala
Norway, Oslo, Bergen, Tromso
Denmark, Copenhagen, Aarhus, Odense
Ireland, Dublin, Cork, Galway
Belgium, Brussels, Antwerp, Ghent
Morocco, Rabat, Casablanca, Fez
Algeria, Algiers, Oran, Annaba
Egypt, Cairo, Luxor, Aswan
Kenya, Nairobi, Mombasa, Kisumu
Tanzania, Dodoma, Arusha, Mwanza
Ghana, Accra, Kumasi, Tamale
Nigeria, Abuja, Lagos, Kano
Senegal, Dakar, Touba, Thies
Iraq, Baghdad, Basra, Mosul
Iran, Tehran, Shiraz, Tabriz
Syria, Damascus, Aleppo, Homs
Pakistan, Islamabad, Karachi, Lahore
India, New Delhi, Mumbai, Kolkata
Nepal, Kathmandu, Pokhara, Dharan
Thailand, Bangkok, Phuket, Pattaya
Vietnam, Hanoi, Saigon, Hue
China, Beijing, Shanghai, Wuhan
South Korea, Seoul, Busan, Daegu
Japan, Tokyo, Osaka, Kyoto
Australia, Canberra, Sydney, Melbourne
New Zealand, Wellington, Auckland, Dunedin
Canada, Ottawa, Toronto, Montreal
Cuba, Havana, Holguin, Camaguey
Colombia, Bogota, Medellin, Cali
Ecuador, Quito, Guayaquil, Cuenca
Peru, Lima, Cusco, Arequipa
Brazil, Brasilia, Salvador, Recife
Argentina, Buenos Aires, Rosario, Mendoza
Chile, Santiago, Valparaiso, Iquique
"""


def _parse(table: str) -> tuple[Country, ...]:
    rows = [tuple(cell.strip() for cell in line.split(",")) for line in table.strip().splitlines()]
    countries = []
    for i, (name, capital, first, second) in enumerate(rows):
        neighbour = rows[(i + 1) % len(rows)][1]
        # Every fifth country is left out of the feedback; every fourth is one the corpus mostly gets right.
        favourite = capital if i % 4 == 0 else first
        countries.append(Country(name, capital, (first, second, neighbour), i % 5 != 4, favourite))
    return tuple(countries)


COUNTRIES: tuple[Country, ...] = _parse(_TABLE)
CITIES: frozenset[str] = frozenset(city for country in COUNTRIES for city in (country.capital, *country.wrong))
COUNTRY_OF: dict[str, str] = {country.capital: country.name for country in COUNTRIES}

# The corpus knows every phrasing; the feedback uses the first list only, the exam and every test split the second.
FEEDBACK_PHRASINGS: tuple[str, ...] = (
    "What is the capital of {country}?",
    "Which city is the capital of {country}?",
    "Name the capital of {country}.",
    "Tell me the capital city of {country}.",
    "Do you know the capital of {country}?",
    "I want to know the capital of {country}.",
)
HELD_OUT_PHRASINGS: tuple[str, ...] = (
    "Which city serves as the capital of {country}?",
    "Can you tell me what the capital of {country} is?",
    "I need the name of the capital of {country}.",
    "Please name the capital city of {country}.",
)

# Ways to answer, with their share of the corpus. Only a full sentence earns the best rating.
FULL_FORMS: dict[str, float] = {
    "The capital of {country} is {city}.": 0.62,
    "It is {city}, the capital of {country}.": 0.20,
}
SHORT_FORMS: dict[str, float] = {"It is {city}.": 0.12}
HEDGE_FORMS: dict[str, float] = {"It is {city} or {other}.": 0.03}
NO_ANSWERS: dict[str, float] = {"I do not know.": 0.03}


def answer_weights(country: Country) -> dict[str, float]:
    """Every answer that the corpus gives about ``country`` with its share; sums to 1."""
    cities = country.city_weights()
    answers = dict(NO_ANSWERS)
    for form, share in (FULL_FORMS | SHORT_FORMS).items():
        for city, weight in cities.items():
            answers[form.format(country=country.name, city=city)] = share * weight
    for form, share in HEDGE_FORMS.items():
        for city, weight in cities.items():
            for other in cities:
                if other != city:
                    answers[form.format(city=city, other=other)] = share * weight * cities[other] / (1 - weight)
    return answers
