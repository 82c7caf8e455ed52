# Whether data may pass from one jurisdiction to another, and on which ground.
#
# A way is open inside one jurisdiction, among the parts of one whole, and where a mechanism of the regulation is in
# force. Nothing else opens it; who owns an enterprise is not asked.
#
# A way is {"from", "to", "what"}: two jurisdictions, and what lies or happens at the end, in words.
# data.regulation.wholes: jurisdiction -> itself and every whole that it is a part of.
# data.regulation.mechanisms: from -> to -> list of mechanisms, with their times in seconds since the epoch.
package dr_cloud.law

import rego.v1

known(spot) if count(data.regulation.wholes[spot.at]) > 0

# One jurisdiction, or two that a whole embraces.
joined(way) if {
	some whole in data.regulation.wholes[way.from]
	whole in data.regulation.wholes[way.to]
}

# A part stands for itself; a whole stands for all its parts.
within(spot, territory) if {
	some whole in data.regulation.wholes[spot.at]
	whole in territory
}

# Adequacy holds for all; the others hold for the enterprises that they name.
applies(mechanism, _) if mechanism.kind == "adequacy"

applies(mechanism, asked) if {
	mechanism.kind == "clauses"
	mechanism.assessment != ""
	asked.enterprise in mechanism.enterprises
}

applies(mechanism, asked) if {
	mechanism.kind == "derogation"
	asked.enterprise in mechanism.enterprises
	asked.action in mechanism.actions
}

preference := {"adequacy": 1, "clauses": 2, "derogation": 3}

title := {"adequacy": "adequacy", "clauses": "contract clauses", "derogation": "a derogation"}

# Every mechanism that holds here and now.
in_force(way, asked) := mechanisms if {
	sources := data.regulation.wholes[way.from]
	destinations := data.regulation.wholes[way.to]
	ways := data.regulation.mechanisms
	now_s := asked.now_s
	mechanisms := [mechanism |
		from := sources[_]
		to := destinations[_]
		mechanism := ways[from][to][_]
		mechanism.valid_from_s <= now_s
		now_s < mechanism.valid_until_s
		applies(mechanism, asked)
	]
}

# The preferred one; of several of a kind the one that lasts longest; of those the first by name.
best(mechanisms) := first if {
	rank := min([preference[m.kind] | m := mechanisms[_]])
	end_s := max([m.valid_until_s | m := mechanisms[_]; preference[m.kind] == rank])
	names := {m.reference | m := mechanisms[_]; preference[m.kind] == rank; m.valid_until_s == end_s}
	name := min(names)
	firsts := [m | m := mechanisms[_]; preference[m.kind] == rank; m.valid_until_s == end_s; m.reference == name]
	first := firsts[0]
}

# The ground on which the way is open; undefined if it is closed.
ground(way, _) := {"until_s": null, "reason": ""} if joined(way)

ground(way, asked) := {"until_s": mechanism.valid_until_s, "reason": reason} if {
	not joined(way)
	mechanism := best(in_force(way, asked))
	reason := sprintf("%s to %s on %s: %s, until %s", [
		way.from,
		way.to,
		title[mechanism.kind],
		mechanism.reference,
		mechanism.valid_until,
	])
}
