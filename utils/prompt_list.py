"""Prompts for FLUX-size models: 12,000 to train on and 256 others to judge with, in 16 categories.

A grammar writes the prompts. GRAMMAR gives every name its options, and an option may name others in braces:

    portrait -> a portrait of a {person} {look} -> a portrait of a beekeeper with freckles and a shy smile

Each choice is taken from a hash of category and index, so the lists are the same in every process, Python version and
machine. Any 16 prompts from a multiple of 16 on hold every category once: a shorter list is the start of a longer one,
and both are mixed alike. The evaluation set is the first 16 prompts of every category; none of them is trained on.
Editing GRAMMAR changes both sets, so results from before and after do not compare.

tiny-flux knows only its drawn scenes; the prompts for it are in utils/scenes.py.
"""

import hashlib
import re
import struct
from collections.abc import Iterator
from functools import cache
from itertools import count

NUM_TRAIN, NUM_EVAL = 12_000, 256

CATEGORIES = (
    *("portrait", "people", "animal", "nature", "place", "food", "product", "vehicle"),
    *("fantasy", "scifi", "lettering", "counting", "position", "colours", "imagination", "design"),
)

# name: option | option | ... An empty option adds nothing; one that begins with a comma is an ending. In one prompt no
# option is taken twice, so "a {colour} {object} and a {colour} {object}" has two colours and two objects. "a" stands
# for "an" too, and a prompt that ends in a full stop gets its capital.
GRAMMAR = """
# shared
colour: red | blue | green | yellow | orange | purple | pink | white | black | brown | turquoise | grey | silver
number: two | three | four | five | six | seven | eight | nine | ten
light: soft morning light | golden evening light | hard midday sun | overcast light | pale winter light |
    the last light of the day
time: at dawn | at noon | just after sunset | on a rainy afternoon | on a grey winter day | late at night |
    in the blue hour | in thick fog | before a thunderstorm | in early spring
mood: calm | lonely | majestic | dreamlike | ominous | melancholy | hopeful
photo: | | , 35mm film photograph | , wide-angle photograph | , shallow depth of field | , cinematic lighting |
    , documentary photograph | , photographed from above | , muted colours | , highly detailed
medium: watercolour painting | oil painting | charcoal drawing | pencil sketch | woodblock print | linocut |
    gouache painting | pastel drawing | digital illustration | paper collage | stained glass window | comic panel |
    children's book illustration | vintage travel poster | copperplate etching | mosaic | claymation still |
    embroidery | pixel art image | low-poly render | fresco | anime still | cubist painting | ballpoint pen drawing |
    impressionist painting
object: teapot | bicycle | suitcase | potted cactus | globe | violin | toaster | skateboard | vase | wooden chair |
    lantern | umbrella | football | typewriter | cat | corgi | rubber duck | birdcage | bucket | pumpkin | guitar |
    wall clock | wheelbarrow | teddy bear | telescope | sofa | ladder | pineapple | backpack | rocking horse
palette: teal and orange | black and white | muted earth tones | three shades of blue | pastel colours | red and cream |
    gold on navy | neon pink and green | autumn colours

# people
portrait: a portrait of a {person} {look} | close-up portrait of a {person} {look}, {key_light} |
    a {person} {look} {backdrop}, {key_light} | black and white portrait of a {person} {backdrop} |
    a {medium} of a {person} {look} | full-length portrait of a {person} in {outfit} {backdrop} | a {feeling} {person} |
    a {feeling} {person} {backdrop}{photo} | Studio headshot of a {person} {look}, {key_light}, 85mm lens. |
    profile of a {person} in {outfit}, {key_light} | A {feeling} {person} in {outfit}, {look}, is standing {backdrop};
    {key_light}, shallow depth of field, natural skin texture.
person: elderly fisherman | young violinist | beekeeper | retired boxer | village blacksmith | night-shift nurse |
    Andean weaver | Scottish shepherd | street magician | ballet dancer | mountain guide | jazz trumpeter | baker |
    tattooed barista | marine biologist | firefighter | chess grandmaster | lighthouse keeper | opera singer |
    carpenter | teenage skateboarder | astronomer | florist | Moroccan potter | Japanese calligrapher | watchmaker |
    Nigerian fashion designer | Brazilian drummer | Norwegian sailor | librarian | circus acrobat | grandmother |
    Mongolian horse rider | taxi driver | twelve-year-old inventor | Korean chef
look: with freckles and a shy smile | with windswept hair | with a thoughtful gaze | with round glasses |
    with long braided hair | laughing with closed eyes | looking over one shoulder | with raindrops on the face |
    with a faint scar above one eyebrow | wearing a hand-knitted scarf | looking straight ahead |
    wearing a wide-brimmed hat | with curly hair and a gap-toothed grin | holding a mug with both hands |
    with paint on both cheeks
backdrop: against a plain grey backdrop | in front of a workshop window | against a mustard-yellow wall | in a doorway |
    beside a rain-streaked window | in a field of tall grass | on a foggy pier | under a single hanging lamp |
    in a narrow alley at night | in a sunlit courtyard | in front of a crowded bookshelf |
    beneath blossoming cherry trees | on an empty train platform
key_light: Rembrandt lighting | soft window light | hard flash | warm backlight | neon light from one side |
    candlelight | flat, even light | a thin rim of light
outfit: a long linen coat | a bright yellow raincoat | a sequinned jacket | traditional festive dress | work clothes |
    a three-piece suit | a quilted winter jacket | faded overalls | a striped jumper
feeling: joyful | pensive | proud | tired | mischievous | serene | determined | surprised
people: {who} {leisure} | {who} {leisure} {time}{photo} | {sport} | {sport}{sport_view} | {work}, {light} |
    {work}{photo} | {work} while {onlooker} | a {medium} of {who} {leisure} | a {medium} of {work} |
    Candid street photograph of {who} {leisure}, {light}. | Documentary photograph of {who} {leisure} {time}, while
    nearby {onlooker}; 35mm film, visible grain, natural colours.
who: two children | a father and daughter | two old friends | a young couple | a group of students | three colleagues |
    a mother and her toddler | four teenagers | an old couple | a family of five | two sisters | three musicians |
    a man in a wheelchair and his brother | two nuns
leisure: flying a kite on a windy beach | sharing an umbrella at a bus stop | eating ice cream on a park bench |
    waiting for the last tram | dancing in a public square | walking along a canal | having a picnic under an oak |
    playing chess in a park | feeding pigeons in front of a cathedral | pushing bicycles up a cobbled lane |
    picking apples in an orchard | looking at boats in a harbour | repairing a wooden boat | riding a Ferris wheel |
    queuing at a food truck | waving from a balcony | crossing a rope bridge | singing around a campfire |
    carrying a ladder across the street
sport: a surfer riding a huge wave | a goalkeeper diving for the ball | a climber hanging from an overhang |
    a figure skater in the middle of a spin | a cyclist leaning into a bend | a gymnast on the balance beam |
    a fencer lunging forward | a marathon runner crossing the finish line | a swimmer coming up for air |
    a show jumper clearing a fence on a grey horse | a basketball player dunking | a kayaker dropping over a waterfall |
    a skateboarder at the top of a ramp | an archer drawing a bow | a ski jumper in mid-air | a rower alone on a river
sport_view: , frozen in motion | , motion blur | , low angle | , seen from above | , black and white sports photograph |
    , telephoto shot | , dramatic backlight | , in the style of a 1930s poster
work: a glassblower shaping a glowing vase | a potter at the wheel | a chef tossing vegetables in a flaming wok |
    a farmer ploughing a terraced field | a welder in a shower of sparks | a tailor cutting blue cloth |
    a conductor leading an orchestra | a scientist at a microscope | a mechanic under a raised car |
    a fisherman mending nets | a teacher writing on a blackboard | a gardener trimming a hedge |
    a barista pouring milk into coffee | a sculptor carving marble | a shoemaker stitching a boot |
    a puppeteer behind a small stage
onlooker: a girl watches | two tourists watch | a cat looks on | a dog sleeps | an old man takes notes |
    a boy eats an apple | a radio plays

# animals and landscapes
animal: {creature} | {creature}{animal_view} | {creature}{animal_view} | a {medium} of {creature} |
    {family}{animal_view} | a {medium} of {family} | macro photograph of a {tiny} on {perch} |
    a {medium} of a {tiny} on {perch} | a {feeling} {pet} {pet_act} | Close-up of the face of a {furry}, every hair in
    focus{animal_view}.
creature: a {forest_animal} {forest_place} | a {savanna_animal} {savanna_place} | a {sea_animal} {sea_place} |
    a {polar_animal} {polar_place} | a {pet} {pet_act} | a {bird} {bird_act} | a {farm_animal} {farm_place}
forest_animal: red fox | brown bear | badger | hedgehog | lynx | roe deer | grey wolf | wild boar
forest_place: on a mossy log | between birch trunks | in a clearing full of ferns | beside a forest stream |
    under a fallen oak | among autumn leaves | in fresh snow
savanna_animal: lion | giraffe | zebra | cheetah | rhinoceros | African elephant | warthog | ostrich
savanna_place: at a shrinking waterhole | in tall dry grass | under an acacia tree | on a dusty plain |
    under approaching storm clouds
sea_animal: sea turtle | humpback whale | manta ray | dolphin | hammerhead shark | sea lion | giant octopus | jellyfish
sea_place: gliding over a coral reef | in a kelp forest | swimming through shafts of sunlight | above a sunken ship |
    passing a shoal of silver fish | in deep blue water
polar_animal: polar bear | arctic fox | walrus | snowy owl | reindeer | harp seal
polar_place: on drifting ice | in a blizzard | on a snowy shore | beside a frozen fjord | under the northern lights
pet: tabby cat | golden retriever | border collie | Siamese cat | dachshund | rabbit | French bulldog | ginger kitten |
    Dalmatian puppy
pet_act: asleep on a stack of newspapers | peering out of a cardboard box | wrapped in a tartan blanket |
    sitting on a windowsill | next to a chewed slipper | wearing a tiny bow tie | waiting by the front door |
    curled up in an armchair | watching goldfish in a bowl
bird: kingfisher | hummingbird | puffin | heron | blue tit | pelican | toucan | golden eagle | robin | cockatoo |
    magpie | barn owl
bird_act: in flight | with its wings spread | ruffling its feathers | perched on a weathered post | about to land |
    in profile, every feather sharp
farm_animal: Highland cow | goat | rooster | donkey | alpaca | sheepdog | piglet | goose | foal
farm_place: behind a wooden gate | in a muddy yard | on a green hillside | in front of a red barn |
    in a straw-filled stable
tiny: ladybird | bumblebee | dragonfly | praying mantis | monarch butterfly | garden snail | jumping spider |
    stag beetle | tree frog
perch: a dew-covered leaf | a blade of grass | a purple thistle | the edge of a mushroom | a wet stone | a daisy |
    a curled fern
furry: lynx | lion | orangutan | snow leopard | otter | wolf | alpaca | tiger | koala | red panda
family: a swan with four cygnets | a lioness carrying her cub | a cat with three kittens in a basket |
    a duck leading her ducklings across a street | a bear with two cubs | a wolf pack trotting in single file |
    a kangaroo with a joey in her pouch | a pair of parrots sharing a fig | a herd of wild horses crossing a river |
    a flock of starlings over a pier
animal_view: , telephoto photograph | , shallow depth of field | , nature documentary still | , low-angle view |
    , backlit | , in muted colours | , black and white photograph
nature: {landform} {sky} | {landform} {sky}{detail}{land_photo} | a {medium} of {landform} {sky} |
    {phenomenon}{land_photo} | macro photograph of a {flower} {flower_state} | a {tree} {tree_state} {tree_place} |
    a {tree} {tree_state} {tree_place}{land_photo} | botanical illustration of a {flower} {botanical} |
    Wide view of {landform} {sky}, in a {mood} mood. | a {medium} of a {tree} {tree_state} {tree_place} | In the
    foreground a {tree} {tree_state}, behind it {landform} {sky}{detail}; a {mood} mood, large format film, rich in
    detail.
landform: a glacier lake below jagged peaks | tall red dunes | a lavender field | a winding river canyon |
    a rainforest waterfall | a volcanic island | a deep fjord | rolling green hills | a salt flat | a bamboo grove |
    a tea plantation on steep slopes | a rocky coast with sea stacks | a mangrove swamp | a high mountain pass |
    terraced rice fields | a heather moor | an alpine meadow | a field of poppies | a black sand beach
sky: under a clearing storm | under a full moon | beneath the Milky Way | under towering clouds | at sunrise | at dusk |
    under a pale winter sun | in drifting fog | in heavy rain | under a double rainbow | lit by distant lightning
detail: | , with a tiny hut for scale | , with a narrow footpath leading into the distance |
    , with birds circling overhead | , with a red tent beside a stream | , with a lone hiker in the distance
land_photo: | | , long exposure | , wide-angle photograph | , large format film | , black and white photograph |
    , panoramic view | , telephoto photograph
phenomenon: a lightning bolt striking a lake | northern lights above a snowy village | lava flowing into the sea |
    hoarfrost on a barbed wire fence | a total solar eclipse over a desert | a wave of fog rolling over a ridge |
    ripples spreading on a pond | a frozen waterfall with blue ice | autumn leaves floating on dark water
flower: sunflower | dandelion | lotus flower | tulip | cactus flower | orchid | poppy | water lily | iris | thistle |
    magnolia blossom | snowdrop | dahlia | foxglove
flower_state: covered in morning dew | rimmed with frost | just opening | backlit by the low sun | after the rain |
    against a black background | with a bee at its centre
tree: old oak | weeping willow | maple | birch | apple tree | larch | chestnut tree | ginkgo | twisted pine
tree_state: heavy with snow | bent by the wind | glowing in the evening sun | full of starlings | wrapped in mist
tree_place: on a hill | beside a pond | at the end of a lane | in a walled garden | at the edge of a wheat field |
    above a cliff
botanical: labelled in fine handwriting | on aged paper | in ink and watercolour | with its roots and seeds shown

# buildings and rooms
place: a {building} {surroundings} | a {building} {surroundings} {time}{photo} |
    a {medium} of a {building} {surroundings} | a {decor} {room} with {feature} |
    isometric illustration of a {building} {surroundings} | an empty {room}, {light} |
    a {street} in {city} {street_detail} | a {street} in {city} {street_detail} {time}{photo} |
    a {medium} of a {street} in {city} {street_detail} | Interior photograph of a {decor} {room} with {feature} and
    {feature}, {light}. | Magazine photograph of a {decor} {room} with {feature}, {feature} and {feature}; in one
    corner, a {object} next to a {object}, {light}.
building: brutalist library | Gothic cathedral | wooden stave church | glass skyscraper | whitewashed chapel |
    Art Deco cinema | lighthouse | ruined castle | Victorian greenhouse | mountain cabin | treehouse | stone windmill |
    modern opera house | mud-brick mosque | five-storey pagoda | railway station | half-timbered inn |
    abandoned factory | observatory | fishing hut on stilts
surroundings: on a cliff above the sea | at the end of a cobbled street | surrounded by pine forest |
    beside a quiet canal | in the middle of a modern city | on a windswept plain | half covered in ivy |
    reflected in a puddle | seen from below | behind an iron gate | on a small island
room: reading room | kitchen | attic bedroom | living room | bathroom | artist's studio | music room | hotel lobby |
    home office | conservatory | child's bedroom | ramen bar | barber shop | bookshop
decor: mid-century modern | Japanese | rustic | Art Nouveau | industrial | minimalist | bohemian | Victorian |
    Scandinavian | Moroccan | 1970s | cluttered
feature: tall arched windows | a wall of hanging plants | terracotta tiles | exposed wooden beams | a skylight |
    a checkerboard floor | dark blue walls | a collection of brass lamps | a large round mirror | striped wallpaper |
    a cat asleep on the rug | a stained glass door | a spiral staircase
street: narrow back street | market street | tram stop | rooftop terrace | quiet square | row of shops | flight of steps
city: Lisbon | Kyoto | Marrakesh | Havana | Prague | Istanbul | Naples | Hanoi | Edinburgh | New Orleans | Varanasi |
    Dakar | Bergen
street_detail: with laundry hanging overhead | lined with scooters | lit by paper lanterns | with a single passer-by |
    with an orange cat in the foreground | painted in bright colours | with a busker and his dog | with wet cobblestones

# things
food: {dish} | {dish} {surface} | {food_shot} of {dish} {surface}, {food_light} | {food_shot} of {dish} with {garnish} |
    a {medium} of {dish} {surface} | {dish} {surface} with {garnish}, {food_light} |
    a market stall piled with {produce} | a market stall piled with {produce} and {produce} {time}{photo} |
    a {cuisine} breakfast laid out {surface}, {food_light} | {hands} | {hands}, {food_light} |
    Recipe card illustration of {dish} with {garnish}. | Seen from above: {dish} on the left, {dish} on the right,
    {dish} in the middle; {colour} tablecloth, {food_light}.
dish: a bowl of ramen with a soft-boiled egg | a stack of blueberry pancakes | a slice of cherry pie |
    a plate of sushi | a margherita pizza with a blistered crust | a loaf of sourdough bread |
    a croissant torn in half | a pot of mussels | a plate of fish tacos | a cheese board with figs and walnuts |
    a lemon tart | a bowl of green curry | a chocolate cake dripping with glaze | a glass of iced coffee |
    a seafood paella | a basket of strawberries | a jar of honey with a wooden dipper | a Greek salad |
    a burger with melting cheddar | a plate of dumplings | a pomegranate cut open | a wedge of watermelon |
    a roast chicken with rosemary
surface: on a marble counter | on a rustic wooden table | on dark slate | on a checked tablecloth |
    on a picnic blanket | on a white table by a window | on a steel kitchen bench | on a breakfast tray
food_shot: top-down photograph | close-up photograph | magazine photograph | phone snapshot | still-life painting
food_light: soft side light | morning light | a dark, moody background | bright even light | candlelight |
    hard sunlight with crisp shadows
garnish: a linen napkin beside it | crumbs scattered around it | a sprig of mint beside it |
    a small glass of wine behind it | a hand reaching in from the right | a small vase of flowers behind it
produce: ripe mangoes | red chillies | wheels of cheese | fresh sardines | cones of spices | pumpkins | artichokes |
    oranges | green olives | round loaves of bread | mushrooms
cuisine: Turkish | Japanese | full English | Mexican | Swiss | Ethiopian | French | Vietnamese
hands: hands kneading dough on a floured board | a chef plating a tiny dessert with tweezers |
    honey dripping from a spoon | wine being poured into a glass | noodles lifted by chopsticks |
    a knife slicing a blood orange | a child licking a whisk | butter melting on hot corn
product: a {finish} {item} {stage} | {ad_shot} of a {finish} {item} {stage}, {ad_light} |
    {ad_shot} of a {item} {stage} | exploded-view drawing of a {item} {drawing} | a model in {garment} {runway} |
    a marker design sketch of a {finish} {item} | a {finish} {item} | packaging design for a {item} in {palette} |
    1950s magazine advertisement for a {finish} {item} | Fashion editorial of a model in {garment} {runway}, {light}. |
    A {finish} {item} {stage} with the brand name "{name}" {letters} above it; {ad_shot}, {ad_light}, a clean layout
    with plenty of empty space.
item: wristwatch | perfume bottle | running shoe | teapot | fountain pen | backpack | desk lamp | film camera |
    electric guitar | mechanical keyboard | lipstick | pocket knife | bicycle helmet | espresso machine | toy train |
    turntable | vacuum flask | armchair | handbag
finish: matte black | translucent | pastel green | glossy white | deep blue | cream-coloured | silver | bright orange |
    two-tone | minimalist | burgundy | olive green | hand-painted
stage: on a concrete plinth | on rippled silk | floating above a pink background | on wet black stone |
    on a bed of moss | on a mirror | surrounded by orange slices | on a stack of old books | on white sand |
    beside a single orchid
ad_shot: advertising photograph | catalogue photograph | studio photograph | 3D render
ad_light: softbox lighting | one hard spotlight | a dramatic rim light | clean bright lighting | warm side light |
    long shadows
drawing: on blueprint paper | with numbered parts | in fine black lines | in a patent from 1910 | in two colours
garment: a floor-length emerald gown | an oversized wool coat | a pleated silver dress | a denim suit | a paper dress |
    a velvet tuxedo | a rain cape of clear plastic | a knitted jumpsuit
runway: on a salt flat | in an empty swimming pool | on a concrete staircase | on a city rooftop | in a wheat field |
    against a red paper backdrop | in a launderette
vehicle: {ride} | {ride} {time}{ride_view} | {ride}{ride_view} | a {medium} of {ride} | a {medium} of {ride} {time} |
    a {colour} {machine} | technical cutaway drawing of a {machine} {drawing} | a toy {machine} on a {colour} carpet |
    a {colour} {machine} in a museum{ride_view} | Promotional photograph of a {colour} {machine}, {ad_light}. | A
    {medium} shows {ride}, with a {colour} {machine} and a {colour} {machine} small in the background.
ride: a {road} {road_place} | a {colour} {road} {road_place} | a {boat} {boat_place} | a {aircraft} {air_place} |
    a {train} {rail_place} | a {colour} {train} {rail_place}
machine: {road} | {boat} | {aircraft} | {train}
road: convertible | pickup truck | double-decker bus | taxi | camper van | fire engine | racing motorcycle |
    electric sports car | delivery scooter | tractor | racing bicycle | milk float
road_place: on a coastal road | in front of a diner | on a desert highway | in a narrow alley | at a petrol station |
    on a mountain pass | on the roof of a car park | beside a wheat field
boat: sailing boat | fishing trawler | canoe | paddle steamer | rowing boat | tugboat | houseboat
boat_place: on a wide lake | entering a small harbour | moored at a wooden jetty | stranded at low tide |
    on a mirror-calm bay | passing a lighthouse | on a jungle river
aircraft: hot-air balloon | biplane | helicopter | glider | seaplane | airship
air_place: above snow-capped mountains | above a sea of clouds | over a patchwork of fields | flying low over a lake |
    over a crowded beach | over a city of red roofs
train: steam locomotive | high-speed train | tram | freight train | monorail | funicular
rail_place: crossing a stone viaduct | arriving at a small station | leaving a tunnel | passing through a pine forest |
    rolling through the old town | climbing a green valley
ride_view: , motion blur | , low-angle view | , side view | , wide shot | , telephoto photograph |
    , cinematic lighting | , muted colours | , photorealistic

# other worlds
fantasy: a {hero} {quest} | a {hero} {quest} {realm}{saga} | a {beast} {beast_act}{saga} | {wonder}{saga} |
    {wonder}, in a {mood} mood | a {hero} and a {beast} {together}{saga} | a {medium} of a {beast} {beast_act} |
    character sheet of a {hero}, front and side view | {realm}, a {hero} is {quest}. | a {medium} of {wonder} |
    a {medium} of a {hero} {quest} | {realm}, a {hero} in a {colour} cloak is {quest} while a {beast} keeps watch; far
    away, {wonder}.
hero: hooded ranger | dwarf blacksmith | elven archer | forest witch | dragon rider | wandering bard | moon priestess |
    goblin merchant | young sorcerer | knight in mossy armour | old wizard | frost giant | pirate queen
quest: reading a glowing map | guarding a gate covered in runes | brewing a violet potion | crossing a rope bridge |
    lighting a lantern of fireflies | facing a wall of thorns | resting beside a campfire |
    holding a crystal that hums with light | playing dice with a skeleton | feeding a tiny dragon
realm: in a forest of giant mushrooms | in a ruined temple | on a floating island | in a valley of crystals |
    at the foot of a black tower | in a city built on giant roots | in a library without end | beside a silver lake |
    beneath two moons
beast: ice dragon | phoenix | griffin | unicorn | stone golem | three-headed hound | winged serpent | giant moth |
    forest spirit with antlers | clockwork lion
beast_act: emerging from the mist | rising from a lake | asleep in a ruined courtyard | standing guard at a gate |
    looking down at a tiny traveller | surrounded by glowing butterflies | drinking from a moonlit pool
together: facing each other across a frozen river | travelling side by side | sharing a meal by the fire |
    sheltering from a storm under a rock | meeting for the first time
wonder: a city on the back of a giant turtle | a castle of coral | a staircase of clouds leading to a door |
    a tree with a house in every branch | a bridge of light between two mountains | a ship sailing through the sky |
    an island held by chains | a market where ghosts trade lanterns | a clock tower grown from crystal |
    a river flowing upwards into the stars | a village inside a whale's skeleton | a lighthouse for dragons
saga: | , fantasy concept art | , book cover illustration | , matte painting | , tarot card design |
    , cinematic lighting | , watercolour storybook style | , ink and gold leaf | , dark fairy tale
scifi: a {crew} {task} | a {crew} {task} {outpost}{film} | {station} {incident}{film} | {station} {incident} |
    a {medium} of {station} | a {era} {everyday} | a {era} {everyday} {incident}{film} |
    a {crew} and a {crew} {outpost}{film} | {starship}{film} | Film still of a {crew} {outpost}, {sci_light}. |
    a {medium} of a {crew} {task} {outpost} | Film still: a {crew} {outpost} is {task}, a {crew} in a {colour} suit
    looks on, and above them {starship}.
crew: maintenance robot | astronaut | android | cyborg courier | alien botanist | deep-space pilot | bounty hunter |
    clone soldier | retired mech pilot | space archaeologist
task: repairing a solar panel | watering a single seedling | watching an eclipse | playing cards alone |
    tuning an old radio | reading a paper book | looking at a hologram of Earth | following glowing footprints |
    carrying a glass jar with a fern | waiting for a shuttle
outpost: on the moon of a ringed planet | in a neon-lit alley | on the hull of a starship | in a flooded city |
    in a desert of glass | on a distant ice moon | beneath a giant antenna | under the dome of a greenhouse
station: a space station | a lunar base | a Martian greenhouse | a colony dome | an alien marketplace |
    an android repair shop | a megacity street | a hall of cryo-sleep chambers | a quantum laboratory | an asteroid mine
incident: during a power cut | overgrown with luminous plants | on its opening day | bathed in red emergency light |
    long after people have left | at shift change | with a lone figure in the foreground | seen through a cracked visor
era: retro-futuristic | cyberpunk | solarpunk | steampunk | biopunk | dieselpunk | 1960s space-age
everyday: train station | kitchen | street market | classroom | laboratory | café | farm | library | barber shop |
    garage | hospital
starship: a needle-shaped starship leaving orbit | a fleet of cargo ships crossing a nebula |
    a lander touching down on a comet | a rusty freighter docking at a moon | a solar sail unfolding near the Sun |
    a probe falling into a gas giant
film: | , science fiction concept art | , film still | , 1970s paperback cover | , volumetric light | , photorealistic |
    , isometric illustration | , anime style
sci_light: neon light from one side | hard white light | backlit haze | the glow of monitors | deep blue shadows

# what image models find hard: text, numbers, positions, colours
lettering: {carrier} that says "{words}" | {carrier} with the text "{words}" {letters}{text_view} |
    {carrier} reading "{words}"{text_view} | a {holder} holding a sign that says "{words}"{text_view} |
    a {holder} holding a sign that says "{words}" {letters} | a logo for {business} called "{name}", {logo_look} |
    a {decade} poster for {event} with the title "{title}" | {carrier} that says "{words}" above and "{words}" below |
    the word "{word}" made of {letter_stuff}{text_view} | a shop front with the name "{name}" {letters}{text_view} | A
    {decade} book cover: the title "{title}" {letters} at the top, a {colour} {object} in the middle, and "{name}" in
    small type at the bottom.
carrier: a neon sign | a wooden shop sign | a chalkboard | a birthday cake | a T-shirt | a coffee mug |
    graffiti on a brick wall | a handwritten note | a street sign | a hot-air balloon | a banner | a sticky note |
    a cinema marquee | a tattoo on a forearm | a postcard | a departure board | a billboard | a badge | a stone tablet |
    a shop window | a bus ticket | a pillow
words: OPEN LATE | GOOD MORNING | Slow Down | HELLO WORLD | Stay Curious | NOT TODAY | Eat More Soup | WET PAINT |
    Last Train Home | BE KIND | No Signal | LEMONADE 50 CENTS | Dream Big | 24 HOURS | Fresh Bread Daily | KEEP LEFT |
    Lost Cat | The End | ROOM 12 | FLUX | 1.58 BITS | Winter Is Over | JAZZ TONIGHT | EXIT | Happy Birthday Ada |
    Free Hugs | Do Not Feed the Ducks | Less Is More | ROUTE 9 | Closed on Mondays | Thank You | Beware of the Goose |
    SOLD OUT
title: The Quiet Hour | To the Moon | Museum of Small Things | Tomorrow | Paper Sun | The Long Way Home | Open Sky |
    Nine Bridges
word: LOVE | OCEAN | QUIET | SUMMER | NORTH | BREAD | LIGHT | ZERO | PEACE | MUSIC | GROW | HOME
letter_stuff: flowers | driftwood | neon tubes | melting ice | autumn leaves | knitted wool | toast | smoke | balloons |
    copper pipes | moss
letters: in bold red letters | in elegant cursive | in hand-drawn capitals | in blue letters | in thin white letters |
    in blocky pixel letters | in golden letters | in loose brush strokes
text_view: | , close-up | , soft daylight | , shallow depth of field | , studio photo | , evening light |
    , flat illustration
holder: panda | astronaut | robot | child | penguin | corgi | snowman | crow | scientist | knight | hedgehog |
    garden gnome
business: a bakery | a bicycle shop | a jazz club | a bookshop | a brewery | a yoga studio | a toy maker |
    a plant nursery | a barber
name: Blue Fern | Nordlicht | Little Anvil | Papaya | Moss & Co | Tin Lantern | Kite | Halcyon | Ember | Third Moon |
    Salt House
logo_look: flat vector style | hand-drawn | one colour on white | with a small icon beside the text | in {palette}
decade: 1920s | 1930s | 1950s | 1960s | 1970s | 1980s | modern
event: a film festival | a chess tournament | a circus | a science fair | a marathon | a space exhibition |
    a flower show
counting: {number} {things} {spot} | a photo of exactly {number} {things} {spot} |
    {number} {things} and {number} {things} {spot} | {number} {herd} {ground} | {number} {herd} {ground}{photo} |
    a {medium} of {number} {herd} {ground} | {number} {crowd} {crowd_act} | {whole} |
    {number} {things} {spot}, one of them {colour} | a single {herd_one} facing {number} {herd} {ground} |
    A {colour} bowl holds {number} {things}, and {number} lie beside it. | On one shelf there are {number} {things}, on
    the next {number} {things}, and on the lowest {number} {things} and a single {colour} {small}.
things: red apples | candles | teacups | dice | seashells | pencils | lemons | eggs | cupcakes | keys | marbles |
    spoons | wine glasses | toy cars | mushrooms | chess pieces | origami cranes | buttons | coins | books | walnuts
spot: on a wooden table | on a windowsill | arranged in a circle | in a straight row | on a white tray |
    on a blue cloth | on a mirror | on a concrete floor
herd: geese | sheep | bicycles | canoes | flamingos | horses | deck chairs | beach huts | wind turbines | cows |
    storks | pine trees | camels | tents
herd_one: dog | child | goat | tractor | snowman | statue
ground: beside a lake | in a meadow | on a beach | on a hilltop | along a quiet road | seen from above | in the fog
crowd: firefighters | children | dancers | monks | scientists | musicians | chefs | astronauts | sailors | farmers
crowd_act: standing in a line | holding umbrellas | looking up at the sky | crossing a bridge | sitting on a wall |
    in matching yellow coats | around a long table | jumping at the same time
whole: a house with {number} windows and a {colour} door | a birthday cake with {number} candles |
    a ladybird with {number} spots | a tree with {number} birdhouses | a sledge pulled by {number} huskies |
    a bouquet of {number} {colour} tulips | a hand holding {number} playing cards | a bear with {number} balloons |
    a shelf with {number} {colour} mugs | a bridge with {number} arches | a pizza cut into {number} slices
position: a {object} {beside} a {object} | a {object} {beside} a {object}{plain} |
    a {object} between a {object} and a {object} | a {small} on top of a {base}{plain} |
    a {small} inside a {container}{plain} | a {small} under a {base}{plain} | a {object} in the foreground and a
    {building} in the background{photo} | a {object} in the top left corner and a {object} in the bottom right
    corner{plain} | a {medium} of a {object} {beside} a {object} | On the left a {object}, on the right a {object}, and
    a {small} in the middle{plain}. | The {object} stands behind the {object}, and a {small} is in front of both{plain}.
    | From left to right: a {object}, a {object}, a {object} and a {object}; a {small} is on top of a {base} behind
    them{plain}.
beside: to the left of | to the right of | in front of | behind | next to | above | below
plain: | , plain grey background | , studio photo | , on a wooden floor | , simple illustration | , white background
small: lemon | mouse | candle | key | teaspoon | robin | frog | apple | seashell | chess pawn | matchbox | rose |
    toy car
base: stack of books | grand piano | barrel | fridge | pillow | wooden crate | park bench | drum | mailbox
container: glass jar | copper pot | snow globe | cardboard box | wooden bowl | fishbowl | straw hat
colours: a {colour} {object} | a {colour} {object} and a {colour} {object} | a {colour} {object} and a {colour}
    {object}{plain} | a {colour} {object}, a {colour} {object} and a {colour} {object} |
    a {colour} bird on a {colour} {object} | a {person} in a {colour} coat with a {colour} umbrella |
    a {colour} house with a {colour} door and a {colour} roof | a room with {colour} walls, a {colour} {object} and a
    {colour} rug | a {colour} and {colour} {pattern} {cloth} | a {colour} {object} {beside} a {colour} {object}{plain} |
    a {medium} of a {colour} {object} on a {colour} background | The {object} is {colour}, and the {object} is {colour}.
    | A {colour} {object}, a {colour} {object}, a {colour} {object} and a {colour} {object} in front of a {colour} wall,
    with a {colour} {pattern} {cloth} in the foreground.
pattern: striped | checked | spotted | zigzag | patchwork
cloth: scarf | tablecloth | dress | hammock | flag | quilt | curtain

# what nobody has seen
imagination: a {figure} made of {material} | a {figure} made of {material} {stage}{dream} | a {zoo} {trick} |
    a {zoo} {costume} {trick} | a {zoo} {costume} {trick}{dream} | {world} inside a {vessel}{dream} |
    {world} inside a {vessel} | a giant {toy} {scale} | a giant {toy} {scale}{dream} |
    a creature that is half {zoo} and half {zoo}{dream} | {surreal}{dream} | a {medium} of a {zoo} {trick} |
    Two hands holding a tiny {figure} made of {material}. | A {zoo} {costume} is {trick}; behind it stands a {figure}
    made of {material}, and in the sky floats a giant {colour} {toy}{dream}.
figure: violin | motorcycle | teapot | castle | horse | swan | suit of armour | sofa | elephant | bicycle | piano |
    dragon | crown | rowing boat | owl
material: stained glass | folded paper | woven wicker | clear ice | autumn leaves | candle wax | rusty gears |
    knitted wool | polished jade | driftwood | white porcelain | coral | circuit boards | fresh flowers |
    liquid chrome | cardboard | translucent jelly | blue smoke
zoo: panda | octopus | hedgehog | llama | penguin | raccoon | capybara | flamingo | walrus | sloth | frog | badger |
    owl | tortoise
trick: riding a unicycle | conducting an orchestra | painting a self-portrait | reading a newspaper on the underground |
    baking bread | playing the saxophone | fixing a bicycle | giving a lecture | pouring tea | surfing a small wave |
    taking a selfie | directing traffic | knitting a scarf
costume: in a tweed suit | wearing round spectacles | in a yellow raincoat | wearing a chef's hat | in a space suit |
    wearing a paper crown
dream: | , photorealistic | , surrealist painting | , studio photograph | , dreamlike colours | , soft 3D render |
    , pop art | , collage of old engravings
world: a city at night | a tiny forest | a thunderstorm | an ocean with sailing boats | a galaxy | a railway station |
    a winter village | a coral reef | a desert caravan
vessel: teacup | light bulb | walnut shell | pocket watch | glass bottle | snow globe | suitcase | matchbox | eggshell |
    bathtub | hollow book
toy: teapot | strawberry | rubber duck | goldfish | ball of yarn | typewriter | pineapple | snail | key | chess pawn |
    telephone | croissant
scale: standing in a wheat field | towering over a small town | drifting on the sea | blocking a busy street |
    half buried in desert sand | on the roof of a skyscraper | stuck in a doorway
surreal: a piano whose keys melt into a waterfall | clouds poured from a watering can |
    a door standing alone in the ocean | a man with a fish tank in place of his head |
    a zebra whose stripes peel off like ribbon | a train running on a rainbow |
    a chess game between the sun and the moon | a staircase that ends in the sky |
    a whale swimming between skyscrapers | a tree whose leaves are tiny umbrellas | an hourglass filled with stars |
    an egg that hatches into a planet
design: {artwork} of a {motif} | {artwork} of a {motif} in {palette}{finishing} | {artwork} of a {motif}{finishing} |
    seamless pattern of {motifs} and {motifs} in {palette} | seamless pattern of {motifs} in {palette}{finishing} |
    a {movement} poster of a {motif} in {palette} | an infographic about {topic} in {palette} |
    user interface of a {app} app in {palette}{finishing} | a map of an island shaped like a {motif} in {palette} |
    a {feeling} {mascot} as the mascot of a {app} app | wallpaper with {motifs} in {movement} style | Sheet of six
    {artwork} designs in {palette}: a {motif}, a {motif}, a {motif}, a {motif}, a {motif} and a {motif}{finishing}.
artwork: minimalist logo | flat vector icon | die-cut sticker | enamel pin | postage stamp | tarot card |
    isometric illustration | pixel art sprite | low-poly model | blueprint | paper-cut silhouette | line-art tattoo |
    embroidered patch | linocut print | app icon | continuous line drawing
motif: {mascot} | mountain | lighthouse | rocket | coffee cup | bicycle | mushroom | pine tree | anchor | compass |
    hot-air balloon | violin | cactus | teapot
mascot: fox | whale | owl | bee | dragon | bear | hare | crane | turtle | cat
motifs: foxes | ferns | lemons | seashells | swallows | cacti | teacups | koi | mushrooms | paper planes | poppies |
    moons
finishing: | , thick outlines | , on a white background | , symmetrical | , fine line work | , rounded shapes |
    , on textured paper
movement: Bauhaus | Art Nouveau | Art Deco | constructivist | psychedelic | mid-century
topic: the water cycle | how bees make honey | the phases of the Moon | the layers of the Earth |
    how bicycle gears work | types of clouds | how to brew tea | the history of bread
app: weather | gardening | meditation | bird-watching | cooking | budget | star-gazing | running | language
"""


def _parse(grammar: str) -> dict[str, list[str]]:
    """The options of every name. A line that begins with blanks continues the one before."""
    rules = (line.split(":", 1) for line in re.sub(r"\n +", " ", grammar).splitlines() if line and line[0] != "#")
    return {name: [option.strip() for option in text.split("|")] for name, text in rules}


_OPTIONS = _parse(GRAMMAR)
# "a" before a vowel sound: an owl, an hourglass, an 85mm lens; but a unicorn, a used car, a one-eyed cat.
_NEEDS_AN = re.compile(r"\b(a) (?=(?!uni[^mn]|us[ei]|uk|eu|one\b)[aeiou]|hour|honest|8|1[18]\b)", re.IGNORECASE)


def _numbers(seed: str) -> Iterator[int]:
    """Endless pseudo-random 32-bit integers that depend on nothing but the seed."""
    for block in count():
        yield from struct.unpack(">8I", hashlib.sha256(f"{seed}/{block}".encode()).digest())


def _compose(category: str, index: int) -> str:
    """The index-th sentence of a category. Two indices may give the same sentence."""
    numbers = _numbers(f"{category}/{index}")
    taken = set()

    def choose(match: re.Match) -> str:
        options = [option for option in _OPTIONS[match[1]] if option not in taken]
        option = options[next(numbers) % len(options)]
        if option:
            taken.add(option)
        return option

    text = "{" + category + "}"
    while "{" in text:
        text = re.sub(r"\{(\w+)\}", choose, text, count=1)
    text = _NEEDS_AN.sub(r"\1n ", text)
    return text[0].upper() + text[1:] if text.endswith(".") else text


@cache
def _all_prompts() -> tuple[str, ...]:
    """Evaluation prompts, then training prompts."""
    seen = set()  # lower-case: capitals alone do not make another prompt

    def different(category: str) -> Iterator[str]:
        for text in (_compose(category, index) for index in count()):
            if text.lower() not in seen:
                seen.add(text.lower())
                yield text

    prompts = []
    streams = [different(category) for category in CATEGORIES]
    for _ in range((NUM_EVAL + NUM_TRAIN) // len(CATEGORIES)):
        # One of each category. Their order varies, so that a rank that takes every k-th prompt sees all categories.
        prompts += sorted((next(s) for s in streams), key=lambda text: hashlib.sha256(text.encode()).digest())
    return tuple(prompts)


def _first(n: int | None, prompts: tuple[str, ...], kind: str) -> list[str]:
    if n is None:
        n = len(prompts)
    if not 1 <= n <= len(prompts):
        raise ValueError(f"{n} {kind} prompts asked for; there are {len(prompts)}, and at least 1 is needed")
    return list(prompts[:n])


def train_prompts(n: int | None = None) -> list[str]:
    """The first n training prompts, by default all 12,000. ValueError if n is below 1 or above that."""
    return _first(n, _all_prompts()[NUM_EVAL:], "training")


def eval_prompts(n: int | None = None) -> list[str]:
    """The first n evaluation prompts, by default all 256; none is a training prompt. ValueError as above."""
    return _first(n, _all_prompts()[:NUM_EVAL], "evaluation")


get_default_prompts = train_prompts  # the name in the published scripts
