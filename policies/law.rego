# Whether data may pass from one jurisdiction to another, and on which ground.
#
# A way is open inside one jurisdiction, among the parts of one whole, and where a mechanism of the regulation is in
# force. Nothing else opens it; who owns an enterprise is not asked.
#
# data.regulation.wholes: jurisdiction -> itself and every whole that it is a part of.
# data.regulation.mechanisms: from -> to -> list of mechanisms, with their times in seconds since the epoch.
package dr_cloud.law

import rego.v1

known(jurisdiction) if count(data.regulation.wholes[jurisdiction]) > 0

# One jurisdiction, or two that a whole embraces.
joined(origin, place) if {
	some whole in data.regulation.wholes[origin]
	whole in data.regulation.wholes[place]
}

# A part stands for itself; a whole stands for all its parts.
within(jurisdiction, territory) if {
	some whole in data.regulation.wholes[jurisdiction]
	whole in territory
}

# Adequacy holds for all; the others hold for the enterprises that they name.
applies(mechanism, _, _) if mechanism.kind == "adequacy"

applies(mechanism, enterprise, _) if {
	mechanism.kind == "clauses"
	mechanism.assessment != ""
	enterprise in mechanism.enterprises
}

applies(mechanism, enterprise, action) if {
	mechanism.kind == "derogation"
	enterprise in mechanism.enterprises
	action in mechanism.actions
}

preference := {"adequacy": 1, "clauses": 2, "derogation": 3}

title := {"adequacy": "adequacy", "clauses": "contract clauses", "derogation": "a derogation"}

# Every mechanism that holds here and now, as [preference, end as a negative number, reference, end, kind].
in_force(origin, place, enterprise, action, now_s) := entries if {
	sources := data.regulation.wholes[origin]
	destinations := data.regulation.wholes[place]
	mechanisms := data.regulation.mechanisms
	entries := [entry |
		from := sources[_]
		to := destinations[_]
		mechanism := mechanisms[from][to][_]
		mechanism.valid_from_s <= now_s
		now_s < mechanism.valid_until_s
		applies(mechanism, enterprise, action)
		entry := [
			preference[mechanism.kind],
			0 - mechanism.valid_until_s,
			mechanism.reference,
			mechanism.valid_until,
			mechanism.kind,
		]
	]
}

# The ground on which the way is open; undefined if it is closed.
ground(origin, place, _, _, _) := {"until_s": null, "reason": ""} if joined(origin, place)

ground(origin, place, enterprise, action, now_s) := {"until_s": 0 - best[1], "reason": reason} if {
	not joined(origin, place)
	best := min(in_force(origin, place, enterprise, action, now_s))
	reason := sprintf("%s to %s on %s: %s, until %s", [origin, place, title[best[4]], best[2], best[3]])
}
