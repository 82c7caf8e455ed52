# Where things lie. Names are looked up in data; what is not known is undefined, and what is undefined opens nothing.
#
# A spot is {"at": a jurisdiction, "what": what is there, in words}.
package dr_cloud.places

import rego.v1

# Where the place itself lies.
at(place, _) := data.data_centers[place.name].jurisdiction if place.kind == "data center"

at(place, enterprise) := data.enterprises[enterprise].sites[place.name] if {
	place.kind == "site"
	place.datastore == ""
}

# Every spot to which data comes that goes to this place.
spots(place, enterprise) := [spot] if {
	place.kind == "site"
	spot := {"at": at(place, enterprise), "what": sprintf("site %s lies", [place.name])}
}

spots(place, enterprise) := center(place, enterprise) if {
	place.kind == "data center"
	place.datastore == ""
}

spots(place, enterprise) := array.concat(center(place, enterprise), [bucket]) if {
	place.kind == "data center"
	bucket := {
		"at": data.data_centers[place.name].datastores[place.datastore],
		"what": sprintf("datastore %s of %s lies", [place.datastore, place.name]),
	}
}

center(place, enterprise) := [
	{"at": at(place, enterprise), "what": sprintf("%s lies", [place.name])},
	{
		"at": data.data_centers[place.name].keys,
		"what": sprintf("the key of %s is held", [place.name]),
	},
]

# Jurisdictions that data comes from: its source's; and the enterprise's own, unless a site of its own is the source.
origins(source, enterprise) := [data.enterprises[enterprise].jurisdiction] if source == null

origins(source, enterprise) := [at(source, enterprise)] if source.kind == "site"

origins(source, enterprise) := [data.enterprises[enterprise].jurisdiction, at(source, enterprise)] if {
	source.kind == "data center"
	source_is_whole(source)
}

source_is_whole(source) if source.datastore == ""

source_is_whole(source) if data.data_centers[source.name].datastores[source.datastore]
