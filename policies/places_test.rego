package dr_cloud.places_test

import data.dr_cloud.places

centers := {
	"uk-south": {"jurisdiction": "UK", "keys": "UK", "datastores": {"ds-1": "UK", "abroad": "USA"}},
	"us-east": {"jurisdiction": "USA", "keys": "CA", "datastores": {"ds-1": "USA"}},
}

enterprises := {"acme": {"jurisdiction": "UK", "owner": "h", "sites": {"leeds": "UK", "lyon": "EU-FR"}}}

center(name, datastore) := {"kind": "data center", "name": name, "datastore": datastore}

site(name) := {"kind": "site", "name": name, "datastore": ""}

spots(place) := found if {
	found := places.spots(place) with data.data_centers as centers
		with data.enterprises as enterprises
		with input as {"enterprise": "acme"}
}

origins(source) := found if {
	found := places.origins with data.data_centers as centers
		with data.enterprises as enterprises
		with input as {"enterprise": "acme", "source": source}
}

test_one_spot_where_all_is_in_one_jurisdiction if {
	spots(center("uk-south", "ds-1")) == [{"at": "UK", "what": "uk-south lies"}]
	spots(center("uk-south", "")) == [{"at": "UK", "what": "uk-south lies"}]
}

test_the_key_elsewhere_is_a_spot if {
	spots(center("us-east", "ds-1")) == [
		{"at": "USA", "what": "us-east lies"},
		{"at": "CA", "what": "the key of us-east is held"},
	]
}

test_the_datastore_elsewhere_is_a_spot if {
	spots(center("uk-south", "abroad")) == [
		{"at": "UK", "what": "uk-south lies"},
		{"at": "USA", "what": "datastore abroad of uk-south lies"},
	]
}

test_a_site_is_a_spot if spots(site("lyon")) == [{"at": "EU-FR", "what": "site lyon lies"}]

test_what_is_not_known_is_no_spot if {
	not spots(center("moon", ""))
	not spots(center("uk-south", "moon"))
	not spots(site("moon"))
	not spots({"kind": "ship", "name": "leeds", "datastore": ""})
	not spots({"kind": "site", "name": "leeds", "datastore": "ds-1"})
	not spots({"kind": "data center", "name": ["uk-south"], "datastore": ""})
}

test_not_without_the_place_of_the_keys if {
	not places.spots(center("uk-south", "")) with data.data_centers as {"uk-south": {"jurisdiction": "UK"}}
		with input as {"enterprise": "acme"}
}

test_a_site_of_another_enterprise_is_not_known if {
	not places.spots(site("leeds")) with data.enterprises as enterprises with input as {"enterprise": "other"}
}

test_origins if {
	origins(null) == ["UK"]
	origins(site("lyon")) == ["EU-FR"]
	origins(center("uk-south", "ds-1")) == ["UK"]
	origins(center("us-east", "")) == ["UK", "USA"]
}

test_no_origins_of_what_is_not_known if {
	not origins(site("moon"))
	not origins(center("moon", ""))
	not origins(center("us-east", "moon"))
	not origins(center("uk-south", "moon"))
	not origins({"kind": "ship", "name": "leeds", "datastore": ""})
	not origins("leeds")
}
