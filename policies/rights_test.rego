package dr_cloud.rights_test

import data.dr_cloud.rights

world := {
	"revision": "r1",
	"regulation": {
		"wholes": {"UK": ["UK"], "USA": ["USA"], "APAC": ["APAC"], "CA": ["CA"]},
		"mechanisms": {
			"UK": {"USA": [bridge], "CA": [object.union(bridge, {"reference": "ca", "valid_until_s": 150})]},
			"CA": {"UK": [object.union(bridge, {"reference": "back"})]},
		},
	},
	"data_centers": {
		"us-east": {"jurisdiction": "USA", "keys": "USA", "datastores": {"ds-1": "USA", "cold": "CA"}},
		"uk-south": {"jurisdiction": "UK", "keys": "UK", "datastores": {"ds-1": "UK"}},
		"ca-1": {"jurisdiction": "CA", "keys": "CA", "datastores": {"ds-1": "CA"}},
	},
	"enterprises": {
		"acme": {"jurisdiction": "USA", "owner": "holding", "sites": {"home": "USA", "far": "APAC"}},
		"brit": {"jurisdiction": "UK", "owner": "holding", "sites": {"home": "UK", "ottawa": "CA"}},
		"lost": {"jurisdiction": "MARS", "owner": "", "sites": {"home": "MARS"}},
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
	"valid_until": "end",
}

base := {
	"action": "keep",
	"enterprise": "acme",
	"source": null,
	"place": center("us-east", "ds-1"),
	"operator": null,
	"vpg": "",
	"target": "",
	"territory": [],
	"now_s": 120,
}

center(name, datastore) := {"kind": "data center", "name": name, "datastore": datastore}

site(name) := {"kind": "site", "name": name, "datastore": ""}

person(jurisdiction) := {"role": "admin", "jurisdiction": jurisdiction}

ask(change) := decide(object.union(base, change))

decide(question) := answer if {
	answer := rights.decision with input as question
		with data.revision as world.revision
		with data.regulation as world.regulation
		with data.data_centers as world.data_centers
		with data.enterprises as world.enterprises
}

no(change, reason) if {
	answer := ask(change)
	answer.allow == false
	answer.reasons == [reason]
	answer.until_s == null
	answer.jurisdictions == []
	answer.revision == "r1"
}

# -- places ------------------------------------------------------------------------------------------------------------

test_at_home_all_is_open if {
	every action in ["replicate", "keep", "test", "failover", "failback", "move"] {
		ask({"action": action}) == {
			"allow": true,
			"reasons": [],
			"until_s": null,
			"jurisdictions": ["USA"],
			"revision": "r1",
		}
	}
}

test_abroad_nothing_is_open if {
	every action in ["replicate", "keep", "test", "failover", "failback", "move"] {
		no({"action": action, "place": center("uk-south", "ds-1")}, "uk-south lies in UK: nothing opens USA to UK")
	}
}

test_a_common_owner_opens_nothing if {
	no({"source": site("home"), "place": center("uk-south", "ds-1")}, "uk-south lies in UK: nothing opens USA to UK")
}

test_a_mechanism_opens_and_is_named if {
	answer := ask({"enterprise": "brit"})
	answer.allow
	answer.reasons == ["UK to USA on adequacy: bridge, until end"]
	answer.until_s == 200
}

test_a_mechanism_ends if {
	no({"enterprise": "brit", "now_s": 200}, "us-east lies in USA: nothing opens UK to USA")
}

test_the_first_end_counts if {
	answer := ask({"enterprise": "brit", "place": center("us-east", "cold")})
	answer.until_s == 150
	count(answer.reasons) == 2
}

test_the_datastore_counts if {
	no({"place": center("us-east", "cold")}, "datastore cold of us-east lies in CA: nothing opens USA to CA")
}

test_the_source_counts if {
	no({"source": site("far")}, "us-east lies in USA: nothing opens APAC to USA")
	no({"source": center("uk-south", ""), "now_s": 300}, "us-east lies in USA: nothing opens UK to USA")
}

test_to_a_site if {
	ask({"action": "failback", "place": site("home")}).allow
	ask({"place": site("home")}).allow
	no({"action": "failback", "place": site("far")}, "site far lies in APAC: nothing opens USA to APAC")
}

test_what_is_kept_is_kept_in_a_datastore if {
	no({"place": center("us-east", "")}, "it is not said in which datastore")
	ask({"action": "replicate", "place": center("us-east", "")}).allow
}

test_a_place_is_needed if {
	every action in ["replicate", "keep", "test", "failover", "failback", "move"] {
		no({"action": action, "place": null}, "it is not said where to")
	}
}

# -- what is not known -------------------------------------------------------------------------------------------------

test_an_unknown_place if {
	no({"place": center("moon", "ds-1")}, "data center moon with datastore ds-1 is not known")
	no({"place": site("moon")}, "site moon is not known")
	no({"source": center("moon", "")}, "data center moon is not known")
	no({"source": center("us-east", "moon")}, "data center us-east with datastore moon is not known")
}

test_an_unknown_enterprise if {
	no({"enterprise": "nobody"}, "enterprise nobody is not known, or lies in no known jurisdiction")
}

test_an_enterprise_in_no_known_jurisdiction if {
	no({"enterprise": "lost"}, "enterprise lost is not known, or lies in no known jurisdiction")
}

test_an_unknown_action if no({"action": "explode"}, "the action explode is not known")

test_what_is_malformed if {
	every change in [
		{"now_s": "120"},
		{"action": 1},
		{"enterprise": null},
		{"vpg": 1},
		{"target": null},
		{"source": "home"},
		{"place": {"kind": "ship", "name": "us-east", "datastore": ""}},
		{"place": {"kind": "data center", "name": 5, "datastore": ""}},
		{"operator": "admin"},
		{"operator": {"role": 1, "jurisdiction": "USA"}},
		{"territory": "USA"},
		{"territory": ["USA", 5]},
	] {
		no(change, "a part of the question is missing or of the wrong kind")
	}
}

test_what_is_missing if {
	every field in object.keys(base) {
		answer := decide(object.remove(base, [field]))
		answer.allow == false
		answer.reasons == ["a part of the question is missing or of the wrong kind"]
	}
}

test_no_revision_no_answer if {
	not rights.decision with input as base
		with data.regulation as world.regulation
		with data.data_centers as world.data_centers
		with data.enterprises as world.enterprises
}

test_without_data_nothing if {
	answer := rights.decision with input as base with data.revision as "r1"
	not answer.allow
	count(answer.reasons) > 0
}

# A spot that lacks something makes fewer ways than there should be.
half_a_spot(_) := [{"at": "USA"}]

test_a_way_that_is_left_out_opens_nothing if {
	ask({"action": "test"}).allow
	answer := ask({"action": "test"}) with data.dr_cloud.places.spots as half_a_spot
	not answer.allow
}

# -- territory ---------------------------------------------------------------------------------------------------------

test_inside_the_territory if ask({"territory": ["APAC", "USA"]}).allow

test_outside_of_the_territory if {
	no({"territory": ["UK", "APAC"]}, "us-east lies in USA outside of the territory UK, APAC")
}

test_the_territory_binds_the_datastore if {
	no(
		{"enterprise": "brit", "place": center("us-east", "cold"), "territory": ["UK", "USA"]},
		"datastore cold of us-east lies in CA outside of the territory UK, USA",
	)
}

test_the_territory_binds_who_sits_abroad if {
	no(
		{
			"enterprise": "brit",
			"action": "read",
			"place": null,
			"operator": person("USA"),
			"territory": ["UK"],
		},
		"the person sits in USA outside of the territory UK",
	)
}

test_at_home_its_own_people_may_sit if {
	ask({"action": "test", "enterprise": "brit", "operator": person("UK"), "territory": ["USA"]}).allow == false
	ask({
		"action": "read",
		"enterprise": "brit",
		"place": null,
		"operator": person("UK"),
		"territory": ["USA"],
	}).allow
}

# -- persons -----------------------------------------------------------------------------------------------------------

test_a_person_at_home if {
	every action in ["read", "logs", "operate"] {
		ask({"action": action, "operator": person("USA")}).allow
		ask({"action": action, "operator": person("USA"), "place": null}).jurisdictions == []
	}
}

test_a_person_abroad if {
	every action in ["read", "logs", "operate", "test", "failover", "failback", "move"] {
		no({"action": action, "operator": person("APAC")}, "the person sits in APAC: nothing opens USA to APAC")
	}
}

test_a_person_with_a_mechanism if {
	answer := ask({"enterprise": "brit", "action": "read", "place": null, "operator": person("USA")})
	answer.allow
	answer.until_s == 200
}

test_a_person_sees_what_lies_at_the_place if {
	no(
		{"enterprise": "brit", "action": "read", "place": center("ca-1", ""), "operator": person("USA")},
		"the person sits in USA: nothing opens CA to USA",
	)
}

test_a_person_is_needed if {
	every action in ["read", "logs", "operate"] {
		no({"action": action}, "it is not said who asks")
	}
}

test_the_person_sits_nowhere_known if {
	every seat in ["", "MARS"] {
		no({"action": "read", "operator": person(seat)}, "it is not known where the person sits")
	}
}

# -- connecting --------------------------------------------------------------------------------------------------------

test_a_site_connects if {
	answer := ask({"action": "connect", "source": site("home"), "place": null})
	answer.allow
	answer.jurisdictions == ["USA"]
	answer.reasons == []
}

test_a_site_connects_by_a_mechanism if {
	answer := ask({"action": "connect", "enterprise": "brit", "source": site("home"), "place": null})
	answer.jurisdictions == ["CA", "UK", "USA"]
	answer.until_s == 150
}

test_a_site_connects_to_be_sent_to if {
	answer := ask({"action": "connect", "enterprise": "brit", "source": site("ottawa"), "place": null, "now_s": 120})
	answer.allow
	answer.jurisdictions == ["CA", "UK"]
}

test_a_site_that_can_only_be_sent_to if {
	world_without_ca := object.union(world.data_centers, {"ca-1": world.data_centers["uk-south"]})
	one_way := object.remove(world.regulation.mechanisms, ["CA"])
	answer := rights.decision with input as object.union(
		base,
		{"action": "connect", "enterprise": "brit", "source": site("ottawa"), "place": null},
	)
		with data.revision as "r1"
		with data.regulation as {"wholes": world.regulation.wholes, "mechanisms": one_way}
		with data.data_centers as world_without_ca
		with data.enterprises as world.enterprises
	answer.allow
	answer.jurisdictions == ["UK"]
	answer.reasons == ["UK to CA on adequacy: ca, until end"]
}

test_a_site_that_reaches_nothing if {
	no({"action": "connect", "source": site("far"), "place": null}, "no data center is open to site far in APAC")
}

test_only_a_site_connects if {
	no({"action": "connect", "place": null}, "it is not said which site connects")
	no({"action": "connect", "source": center("us-east", ""), "place": null}, "it is not said which site connects")
}

test_an_unknown_site_does_not_connect if {
	no({"action": "connect", "source": site("moon"), "place": null}, "site moon is not known")
}
