"""The words of the toy world's three languages. The first half of each table is of the home, the second of outdoors.

Columns are divided by `|`: English, French, German. Within a language no form belongs to two entries, so that every
word can be read back; nouns and adjectives are spelt out, German adjectives get their endings from the grammar.
"""

from __future__ import annotations

# English: one, many. French: masculine, feminine, and both in the plural; German likewise: English does not tell them
# apart. Where the gender is fixed: one, many, gender.
AGENTS = """
neighbour neighbours | voisin voisine voisins voisines | nachbar nachbarin nachbarn nachbarinnen
student students | étudiant étudiante étudiants étudiantes | student studentin studenten studentinnen
teacher teachers | enseignant enseignante enseignants enseignantes | lehrer lehrerin lehrer lehrerinnen
lawyer lawyers | avocat avocate avocats avocates | anwalt anwältin anwälte anwältinnen
customer customers | client cliente clients clientes | kunde kundin kunden kundinnen
man men | homme hommes m | mann männer m
woman women | femme femmes f | frau frauen f
aunt aunts | tante tantes f | tante tanten f
uncle uncles | oncle oncles m | onkel onkel m
baby babies | bébé bébés m | baby babys n
farmer farmers | fermier fermière fermiers fermières | bauer bäuerin bauern bäuerinnen
player players | joueur joueuse joueurs joueuses | spieler spielerin spieler spielerinnen
runner runners | coureur coureuse coureurs coureuses | läufer läuferin läufer läuferinnen
swimmer swimmers | nageur nageuse nageurs nageuses | schwimmer schwimmerin schwimmer schwimmerinnen
dancer dancers | danseur danseuse danseurs danseuses | tänzer tänzerin tänzer tänzerinnen
boy boys | garçon garçons m | junge jungen m
girl girls | fille filles f | mädchen mädchen n
dog dogs | chien chiens m | hund hunde m
horse horses | cheval chevaux m | pferd pferde n
cat cats | chat chats m | katze katzen f
"""

# French: masculine, feminine, and both in the plural. German: without ending.
TRAITS = """
tired | fatigué fatiguée fatigués fatiguées | müd
shy | timide timide timides timides | schüchtern
angry | furieux furieuse furieux furieuses | wütend
famous | célèbre célèbre célèbres célèbres | berühmt
elegant | élégant élégante élégants élégantes | elegant
brave | courageux courageuse courageux courageuses | mutig
strong | fort forte forts fortes | stark
athletic | sportif sportive sportifs sportives | sportlich
energetic | énergique énergique énergiques énergiques | energisch
wet | mouillé mouillée mouillés mouillées | nass
"""

# English: many, one, past. French and German: one, many, participle.
ACTIONS = """
buy buys bought | achète achètent acheté | kauft kaufen gekauft
clean cleans cleaned | nettoie nettoient nettoyé | putzt putzen geputzt
open opens opened | ouvre ouvrent ouvert | öffnet öffnen geöffnet
choose chooses chose | choisit choisissent choisi | wählt wählen gewählt
borrow borrows borrowed | emprunte empruntent emprunté | leiht leihen geliehen
break breaks broke | casse cassent cassé | zerbricht zerbrechen zerbrochen
draw draws drew | dessine dessinent dessiné | zeichnet zeichnen gezeichnet
seek seeks sought | cherche cherchent cherché | sucht suchen gesucht
throw throws threw | lance lancent lancé | wirft werfen geworfen
catch catches caught | attrape attrapent attrapé | fängt fangen gefangen
carry carries carried | porte portent porté | trägt tragen getragen
pull pulls pulled | tire tirent tiré | zieht ziehen gezogen
push pushes pushed | pousse poussent poussé | schiebt schieben geschoben
see sees saw | voit voient vu | sieht sehen gesehen
chase chases chased | poursuit poursuivent poursuivi | jagt jagen gejagt
lift lifts lifted | soulève soulèvent soulevé | hebt heben gehoben
"""

# One, many and, in French and German, the gender.
THINGS = """
chair chairs | chaise chaises f | stuhl stühle m
table tables | table tables f | tisch tische m
window windows | fenêtre fenêtres f | fenster fenster n
letter letters | lettre lettres f | brief briefe m
book books | livre livres m | buch bücher n
cup cups | tasse tasses f | tasse tassen f
apple apples | pomme pommes f | apfel äpfel m
umbrella umbrellas | parapluie parapluies m | regenschirm regenschirme m
picture pictures | tableau tableaux m | bild bilder n
key keys | clé clés f | schlüssel schlüssel m
ball balls | ballon ballons m | ball bälle m
bicycle bicycles | vélo vélos m | fahrrad fahrräder n
kite kites | cerf-volant cerfs-volants m | drachen drachen m
boat boats | bateau bateaux m | boot boote n
rope ropes | corde cordes f | seil seile n
flag flags | drapeau drapeaux m | fahne fahnen f
stone stones | pierre pierres f | stein steine m
stick sticks | bâton bâtons m | stock stöcke m
axe axes | hache haches f | axt äxte f
helmet helmets | casque casques m | helm helme m
"""

LOOKS = """
red | rouge rouge rouges rouges | rot
white | blanc blanche blancs blanches | weiß
black | noir noire noirs noires | schwarz
ugly | laid laide laids laides | hässlich
blue | bleu bleue bleus bleues | blau
green | vert verte verts vertes | grün
yellow | jaune jaune jaunes jaunes | gelb
old | ancien ancienne anciens anciennes | alt
"""

# The last word of a phrase is its own: by it the place, or the time, is read.
PLACES = """
in the kitchen | dans la cuisine | in der küche
at the station | à la gare | am bahnhof
in the office | au bureau | im büro
behind the church | derrière l'église | hinter der kirche
in the cellar | dans la cave | im keller
on the beach | sur la plage | am strand
in the park | dans le parc | im park
near the river | près de la rivière | am fluss
under the bridge | sous le pont | unter der brücke
on the mountain | sur la montagne | auf dem berg
"""

TIMES = """
today | aujourd'hui | heute
every day | chaque jour | jeden tag
yesterday | hier | gestern
last week | la semaine dernière | letzte woche
now | maintenant | jetzt
often | souvent | oft
on monday | lundi | am montag
long ago | autrefois | früher
"""
PAST_TIMES = {"yesterday", "week", "monday", "ago"}  # these go with the past, the others with the present

# The first word is its own. After the first two, German sends its verb to the end.
LINKS = """
while | pendant que | während
because | parce que | weil
and | et | und
"""
SUBORDINATE = {"while", "because"}
