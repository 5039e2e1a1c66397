#!/bin/sh
# Prints docker-compose.yml with a released image as its default, so that this one file starts the three
# services without a clone and without a build.
#
#   .github/release-compose.sh ghcr.io/OWNER/visitas:0.1.0
set -eu
cd "$(dirname "$0")/.."
if [ $# != 1 ]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
# shellcheck disable=SC2016 # The text itself, for grep and sed.
unset_image='    image: \${VISITAS_IMAGE:-}'
grep -qx "$unset_image" docker-compose.yml
sed "s|^$unset_image\$|    image: \${VISITAS_IMAGE:-$1}|" docker-compose.yml
