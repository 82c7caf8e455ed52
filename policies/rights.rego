# May this be done? The one entry is `decision`; what it is asked and what it answers is in README.md.
#
# It is a yes only if every part of the question is there, is known, and every way that data would take is open. What is
# missing, malformed or unknown leaves a rule undefined, and then `allow` is not true.
package dr_cloud.rights

import data.dr_cloud.law
import data.dr_cloud.places
import rego.v1

decision := {
	"allow": true,
	"reasons": sort({ground.reason | ground := grounds[_]; ground.reason != ""}),
	"until_s": until_s,
	"jurisdictions": jurisdictions,
	"revision": data.revision,
} if {
	allow
}

decision := {
	"allow": false,
	"reasons": sort(why),
	"until_s": null,
	"jurisdictions": [],
	"revision": data.revision,
} if {
	not allow
}

# -- the rules ---------------------------------------------------------------------------------------------------------

# Data goes to a place, is kept or used there; a person may be who asks.
allow if {
	input.action in {"replicate", "test", "failover", "failback", "move"}
	well_formed
	input.place != null
	every_way_is_open
}

# What is kept is kept in a datastore, and the answer must be about that one. A site keeps its own.
allow if {
	input.action == "keep"
	well_formed
	kept_somewhere
	every_way_is_open
}

# A person reads data or acts on it.
allow if {
	input.action in {"read", "logs", "operate"}
	well_formed
	input.operator != null
	every_way_is_open
}

# A site connects if there is a data center to which its data may go, or from which data may come to it.
allow if {
	input.action == "connect"
	well_formed
	input.source.kind == "site"
	count(reach) > 0
	every_way_is_open
}

kept_somewhere if input.place.datastore != ""

kept_somewhere if input.place.kind == "site"

# -- the question ------------------------------------------------------------------------------------------------------

well_formed if {
	is_number(input.now_s)
	is_string(input.action)
	is_string(input.enterprise)
	is_string(input.vpg)
	is_string(input.target)
	is_place(input.source)
	is_place(input.place)
	is_operator(input.operator)
	is_array(input.territory)
	count([name | name := input.territory[_]; is_string(name)]) == count(input.territory)
}

is_place(place) if place == null

is_place(place) if {
	place.kind in {"data center", "site"}
	is_string(place.name)
	is_string(place.datastore)
}

is_operator(operator) if operator == null

is_operator(operator) if {
	is_string(operator.role)
	is_string(operator.jurisdiction)
}

# -- the ways ----------------------------------------------------------------------------------------------------------

# Where data comes to; undefined if what is named is not known.
spots := [] if input.place == null

spots := places.spots(input.place) if input.place != null

# A person sees what is the enterprise's, and what lies at the place.
seen := [] if input.operator == null

seen := [places.home] if {
	input.operator != null
	input.place == null
}

seen := [places.home, places.at(input.place)] if {
	input.operator != null
	input.place != null
}

seat := {"at": input.operator.jurisdiction, "what": "the person sits"}

at_home if law.known({"at": places.home})

ways := array.concat(to_place, to_person) if {
	at_home
	origins := places.origins
	here := spots
	viewed := seen
	to_place := [{"from": from, "to": spot.at, "what": spot.what} | from := origins[_]; spot := here[_]]
	to_person := [{"from": from, "to": seat.at, "what": seat.what} | from := viewed[_]]
	count(to_place) == count(origins) * count(here)
}

found := [ground | way := ways[_]; ground := law.ground(way, input)]

grounds := array.concat(found, reached) if ways

every_way_is_open if {
	count(ways) == count(found)
	count([spot | spot := ends[_]; inside(spot)]) == count(ends)
}

# The territory of a VPG binds every spot; where the enterprise itself is at home, its own people may sit.
ends := spots if input.operator == null

ends := array.concat(spots, [seat]) if input.operator != null

inside(_) if count(input.territory) == 0

inside(spot) if law.within(spot, input.territory)

inside(spot) if {
	spot == seat
	law.joined({"from": places.home, "to": spot.at})
}

# -- what a site reaches -----------------------------------------------------------------------------------------------

centers := {center.jurisdiction | center := data.data_centers[_]}

# Jurisdiction of data centers -> the ground on which data goes there from the site, or comes from there.
reach[center] := ground if {
	input.action == "connect"
	some center in centers
	ground := out(center)
}

reach[center] := ground if {
	input.action == "connect"
	some center in centers
	not out(center)
	ground := back(center)
}

out(center) := law.ground({"from": places.origins[0], "to": center}, object.union(input, {"action": "replicate"}))

# What is the enterprise's must be allowed in the data center first.
back(center) := ground if {
	asked := object.union(input, {"action": "failback"})
	law.ground({"from": places.home, "to": center}, asked)
	law.ground({"from": places.home, "to": places.origins[0]}, asked)
	ground := law.ground({"from": center, "to": places.origins[0]}, asked)
}

reached := [ground | input.action == "connect"; ground := reach[_]]

# -- what goes with a yes ----------------------------------------------------------------------------------------------

lasting := [ground.until_s | ground := grounds[_]; ground.until_s != null]

until_s := min(lasting) if count(lasting) > 0

until_s := null if count(lasting) == 0

jurisdictions := sort([center | reach[center]]) if input.action == "connect"

jurisdictions := [places.at(input.place)] if {
	input.action != "connect"
	input.place != null
}

jurisdictions := [] if {
	input.action != "connect"
	input.place == null
}

# -- what goes with a no -----------------------------------------------------------------------------------------------

why contains "the policies do not allow it" if {
	well_formed
	count(causes) == 0
}

why contains cause if some cause in causes

why contains "a part of the question is missing or of the wrong kind" if not well_formed

causes contains cause if {
	well_formed
	some cause in lacks
}

causes contains cause if {
	well_formed
	some cause in strangers
}

causes contains cause if {
	well_formed
	some cause in obstacles
}

to_places := {"replicate", "keep", "test", "failover", "failback", "move"}

by_persons := {"read", "logs", "operate"}

lacks contains sprintf("the action %s is not known", [input.action]) if {
	not input.action in to_places
	not input.action in by_persons
	input.action != "connect"
}

lacks contains "it is not said where to" if {
	input.action in to_places
	input.place == null
}

lacks contains "it is not said in which datastore" if {
	input.action == "keep"
	input.place != null
	not kept_somewhere
}

lacks contains "it is not said who asks" if {
	input.action in by_persons
	input.operator == null
}

lacks contains "it is not said which site connects" if {
	input.action == "connect"
	not input.source.kind == "site"
}

strangers contains sprintf("enterprise %s is not known, or lies in no known jurisdiction", [input.enterprise]) if {
	not at_home
}

strangers contains sprintf("%s %s is not known", [place.kind, called(place)]) if {
	place := [input.source, input.place][_]
	place != null
	not places.spots(place)
}

strangers contains "it is not known where the person sits" if {
	input.operator != null
	not law.known(seat)
}

obstacles contains sprintf("%s in %s: nothing opens %s to %s", [way.what, way.to, way.from, way.to]) if {
	way := ways[_]
	not unseated(way)
	not law.ground(way, input)
}

obstacles contains concat(" ", [spot.what, "in", spot.at, "outside of the territory", territory]) if {
	spot := ends[_]
	not inside(spot)
	territory := concat(", ", input.territory)
}

obstacles contains sprintf("no data center is open to site %s in %s", [input.source.name, places.origins[0]]) if {
	input.action == "connect"
	input.source.kind == "site"
	count(reach) == 0
}

unseated(way) if {
	way.what == seat.what
	not law.known(seat)
}

called(place) := place.name if place.datastore == ""

called(place) := sprintf("%s with datastore %s", [place.name, place.datastore]) if place.datastore != ""
