package dr_cloud.law_test

import data.dr_cloud.law

regulation := {
	"wholes": {
		"UK": ["UK"],
		"USA": ["USA"],
		"EU": ["EU"],
		"EU-DE": ["EU-DE", "EU"],
		"EU-FR": ["EU-FR", "EU"],
	},
	"mechanisms": {
		"UK": {"USA": [bridge, old_bridge, clauses, derogation], "EU": [object.union(bridge, {"reference": "eu"})]},
		"EU-DE": {"UK": [clauses]},
	},
}

bridge := {
	"kind": "adequacy",
	"reference": "bridge",
	"assessment": "",
	"enterprises": [],
	"actions": [],
	"valid_from_s": 100,
	"valid_until_s": 200,
	"valid_until": "end-200",
}

old_bridge := object.union(bridge, {"reference": "old bridge", "valid_until_s": 150, "valid_until": "end-150"})

clauses := object.union(
	bridge,
	{
		"kind": "clauses",
		"reference": "scc",
		"assessment": "TIA-1",
		"enterprises": ["acme"],
		"valid_from_s": 50,
		"valid_until_s": 300,
		"valid_until": "end-300",
	},
)

derogation := object.union(clauses, {
	"kind": "derogation",
	"reference": "consent",
	"actions": ["failover"],
	"valid_from_s": 0,
	"valid_until_s": 400,
	"valid_until": "end-400",
})

way(from, to) := {"from": from, "to": to}

asked(enterprise, action, now_s) := {"enterprise": enterprise, "action": action, "now_s": now_s}

ground(from, to, enterprise, action, now_s) := found if {
	found := law.ground(way(from, to), asked(enterprise, action, now_s)) with data.regulation as regulation
}

test_inside_one_jurisdiction if ground("UK", "UK", "x", "keep", 1) == {"until_s": null, "reason": ""}

test_between_parts_of_one_whole if ground("EU-DE", "EU-FR", "x", "keep", 1).until_s == null

test_between_part_and_whole if {
	ground("EU-DE", "EU", "x", "keep", 1).until_s == null
	ground("EU", "EU-DE", "x", "keep", 1).until_s == null
}

test_not_from_one_to_another if not ground("USA", "UK", "acme", "failover", 120)

test_not_where_nothing_is_known if {
	not ground("MARS", "MARS", "x", "keep", 1)
	not ground("", "", "x", "keep", 1)
	not ground("UK", "MARS", "x", "keep", 1)
	not ground(5, 5, "x", "keep", 1)
}

test_not_without_a_regulation if not law.ground(way("UK", "UK"), asked("x", "keep", 1)) with data.regulation as {}

test_adequacy_while_it_lasts if {
	not ground("UK", "USA", "x", "keep", 99)
	ground("UK", "USA", "x", "keep", 100)
	ground("UK", "USA", "x", "keep", 199)
	not ground("UK", "USA", "x", "keep", 200)
}

test_adequacy_is_preferred_and_the_longer_one if {
	ground("UK", "USA", "acme", "failover", 120) == {
		"until_s": 200,
		"reason": "UK to USA on adequacy: bridge, until end-200",
	}
}

test_clauses_for_whom_they_name if {
	ground("UK", "USA", "acme", "keep", 250) == {
		"until_s": 300,
		"reason": "UK to USA on contract clauses: scc, until end-300",
	}
	not ground("UK", "USA", "other", "keep", 250)
}

test_no_clauses_without_an_assessment if {
	bare := object.union(clauses, {"assessment": ""})
	rules := object.union(regulation, {"mechanisms": {"USA": {"UK": [bare]}}})
	not law.ground(way("USA", "UK"), asked("acme", "keep", 250)) with data.regulation as rules
}

test_derogation_for_what_it_names if {
	ground("UK", "USA", "acme", "failover", 350) == {
		"until_s": 400,
		"reason": "UK to USA on a derogation: consent, until end-400",
	}
	not ground("UK", "USA", "acme", "keep", 350)
	not ground("UK", "USA", "other", "failover", 350)
}

test_a_kind_that_is_not_known_opens_nothing if {
	odd := object.union(bridge, {"kind": "goodwill"})
	rules := object.union(regulation, {"mechanisms": {"USA": {"UK": [odd]}}})
	not law.ground(way("USA", "UK"), asked("acme", "keep", 120)) with data.regulation as rules
}

test_a_whole_stands_for_its_parts if {
	ground("UK", "EU-FR", "x", "keep", 120).reason == "UK to EU-FR on adequacy: eu, until end-200"
}

test_a_part_stands_for_itself if {
	ground("EU-DE", "UK", "acme", "keep", 120)
	not ground("EU-FR", "UK", "acme", "keep", 120)
	not ground("EU", "UK", "acme", "keep", 120)
}

test_within if {
	law.within({"at": "UK"}, ["USA", "UK"]) with data.regulation as regulation
	law.within({"at": "EU-DE"}, ["EU"]) with data.regulation as regulation
	not law.within({"at": "EU"}, ["EU-DE"]) with data.regulation as regulation
	not law.within({"at": "UK"}, ["USA"]) with data.regulation as regulation
	not law.within({"at": "MARS"}, ["MARS"]) with data.regulation as regulation
}

test_known if {
	law.known({"at": "UK"}) with data.regulation as regulation
	not law.known({"at": "MARS"}) with data.regulation as regulation
	not law.known({"at": ""}) with data.regulation as regulation
}
