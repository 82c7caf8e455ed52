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

home := data.enterprises[input.enterprise].jurisdiction

origins := places.origins(input.source, input.enterprise)

# Undefined if anything that is named is not known.
spots := [] if input.place == null

spots := places.spots(input.place, input.enterprise) if input.place != null

# What a person sees is the enterprise's, and lies where the place is.
seen := [] if input.operator == null

seen := [home] if {
	input.operator != null
	input.place == null
}

seen := [home, places.at(input.place, input.enterprise)] if {
	input.operator != null
	input.place != null
}

seat := {"at": input.operator.jurisdiction, "what": "the person sits"}

ways := array.concat(to_place, to_person) if {
	law.known(home)
	to_place := [{"from": from, "to": spot} | from := origins[_]; spot := spots[_]]
	to_person := [{"from": from, "to": seat} | from := seen[_]]
	count(to_place) == count(origins) * count(spots)
	count(to_person) == count(seen)
}

open(way) := law.ground(way.from, way.to.at, input.enterprise, input.action, input.now_s)

grounds := array.concat([ground | way := ways[_]; ground := open(way)], reached) if ways

every_way_is_open if {
	count(origins) > 0
	count([way | way := ways[_]; open(way)]) == count(ways)
	count([way | way := ways[_]; inside(way.to)]) == count(ways)
}

# The territory of a VPG binds every spot; where the enterprise itself is at home, its own people may sit.
inside(_) if count(input.territory) == 0

inside(spot) if law.within(spot.at, input.territory)

inside(spot) if {
	spot == seat
	law.joined(spot.at, home)
}

# -- what a site reaches -----------------------------------------------------------------------------------------------

centers := {center.jurisdiction | center := data.data_centers[_]}

# Jurisdiction of data centers -> the ground on which data goes there from the site, or comes from there.
reach[center] := ground if {
	some center in centers
	ground := law.ground(origins[0], center, input.enterprise, "replicate", input.now_s)
}

reach[center] := ground if {
	some center in centers
	not law.ground(origins[0], center, input.enterprise, "replicate", input.now_s)
	ground := law.ground(center, origins[0], input.enterprise, "failback", input.now_s)
	law.ground(home, origins[0], input.enterprise, "failback", input.now_s)
}

reached := [ground | input.action == "connect"; ground := reach[_]]

# -- what goes with a yes ----------------------------------------------------------------------------------------------

ends := [ground.until_s | ground := grounds[_]; ground.until_s != null]

until_s := min(ends) if count(ends) > 0

until_s := null if count(ends) == 0

jurisdictions := sort([center | reach[center]]) if input.action == "connect"

jurisdictions := [places.at(input.place, input.enterprise)] if {
	input.action != "connect"
	input.place != null
}

jurisdictions := [] if {
	input.action != "connect"
	input.place == null
}

# -- what goes with a no -----------------------------------------------------------------------------------------------

why contains "the policies do not allow it" if count(causes) == 0

why contains cause if some cause in causes

causes contains "a part of the question is missing or of the wrong kind" if not well_formed

causes contains sprintf("the action %s is not known", [input.action]) if {
	well_formed
	not input.action in {"connect", "replicate", "keep", "test", "failover", "failback", "move", "read", "logs", "operate"}
}

causes contains "it is not said where to" if {
	well_formed
	input.action in {"replicate", "keep", "test", "failover", "failback", "move"}
	input.place == null
}

causes contains "it is not said in which datastore" if {
	well_formed
	input.action == "keep"
	input.place != null
	not kept_somewhere
}

causes contains "it is not said who asks" if {
	well_formed
	input.action in {"read", "logs", "operate"}
	input.operator == null
}

causes contains "it is not said which site connects" if {
	well_formed
	input.action == "connect"
	not input.source.kind == "site"
}

causes contains sprintf("enterprise %s is not known, or lies in no known jurisdiction", [input.enterprise]) if {
	well_formed
	not law.known(home)
}

causes contains sprintf("%s %s is not known", [place.kind, named(place)]) if {
	well_formed
	place := [input.source, input.place][_]
	place != null
	not places.spots(place, input.enterprise)
}

causes contains "it is not known where the person sits" if {
	well_formed
	input.operator != null
	not law.known(input.operator.jurisdiction)
}

causes contains sprintf("%s in %s: nothing opens %s to %s", [way.to.what, way.to.at, way.from, way.to.at]) if {
	well_formed
	way := ways[_]
	not unseated(way.to)
	not open(way)
}

causes contains concat(" ", [spot.what, "in", spot.at, "outside of the territory", territory]) if {
	well_formed
	spot := ways[_].to
	not inside(spot)
	territory := concat(", ", input.territory)
}

causes contains sprintf("no data center is open to site %s in %s", [input.source.name, origins[0]]) if {
	well_formed
	input.action == "connect"
	input.source.kind == "site"
	count(reach) == 0
}

unseated(spot) if {
	spot == seat
	not law.known(spot.at)
}

named(place) := place.name if place.datastore == ""

named(place) := sprintf("%s with datastore %s", [place.name, place.datastore]) if place.datastore != ""
