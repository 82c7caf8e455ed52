# Where things lie. Names are looked up in data; what is not known is undefined, and what is undefined opens nothing.
#
# A spot is {"at": a jurisdiction, "what": what is there, in words}.
package dr_cloud.places

import rego.v1

# Where the enterprise itself is at home.
home := data.enterprises[input.enterprise].jurisdiction

# Where a place itself lies. Sites are those of the enterprise that the question is about.
at(place) := data.data_centers[place.name].jurisdiction if place.kind == "data center"

at(place) := data.enterprises[input.enterprise].sites[place.name] if {
	place.kind == "site"
	place.datastore == ""
}

bucket(place) := data.data_centers[place.name].datastores[place.datastore]

# Every spot to which data comes that goes to this place: the place, its key and its datastore, where they lie elsewhere.
spots(place) := [{"at": at(place), "what": sprintf("site %s lies", [place.name])}] if place.kind == "site"

spots(place) := array.concat([{"at": at(place), "what": sprintf("%s lies", [place.name])}], parts) if {
	place.kind == "data center"
	named(place)
	center := at(place)
	keys := data.data_centers[place.name].keys
	key := [{"at": keys, "what": sprintf("the key of %s is held", [place.name])} | keys != center]
	buckets := [{"at": bucket(place), "what": sprintf("datastore %s of %s lies", [place.datastore, place.name])} |
		place.datastore != ""
		bucket(place) != center
	]
	parts := array.concat(key, buckets)
}

# A datastore that is named must be there.
named(place) if place.datastore == ""

named(place) if bucket(place)

# Jurisdictions that data comes from: its source's; and the enterprise's own, unless a site of its own is the source.
origins := [home] if input.source == null

origins := [at(input.source)] if input.source.kind == "site"

origins := [home] if {
	input.source.kind == "data center"
	named(input.source)
	at(input.source) == home
}

origins := [home, at(input.source)] if {
	input.source.kind == "data center"
	named(input.source)
	at(input.source) != home
}
