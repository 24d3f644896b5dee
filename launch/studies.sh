#!/usr/bin/env bash
# The studies of the shipped recipes, five seeds each, as many at once as there are cores, one process and core each:
#   ./launch/studies.sh [digits] [fashion-mnist] [glyphs]      all three without arguments
# Results lie in launch/studies/<recipe>/results, a few KB an arm and seed; what is there is not run again. SEEDS="0 1" runs
# some, ARMS=top,composed,random only those arms. The set of glyphs is rendered first, from the fonts that
# launch/render_glyphs.py names.
set -euo pipefail
status=0
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./launch/setup.sh
(($#)) || set -- digits fashion-mnist glyphs
for recipe in "$@"; do
    # Beside the arms of every study: options of the paper's objective, and other ways to group the classes.
    arms=("paper-all=objective={kind: paper, routes: all}" "paper-batch=objective={kind: paper, denominator: batch}")
    case $recipe in
        digits) arms+=("confusion=pyramid.1.partition=confusion") ;;
        fashion-mnist) arms+=("confusion=pyramid.1={teachers: 2, partition: confusion, model: pkd_resnet_s}") ;;
        glyphs)
            [[ -f data/glyphs.npz ]] || .venv/bin/python launch/render_glyphs.py || { status=$?; continue; }
            arms+=("contiguous=pyramid.1.partition=contiguous pyramid.2.partition=contiguous"
                   "random=pyramid.1.partition=random pyramid.2.partition=random") ;;
    esac
    more=(${ARMS:+--arms "$ARMS"})
    for arm in "${arms[@]}"; do
        [[ -n ${ARMS:-} && ,$ARMS, != *,${arm%%=*},* ]] || more+=(--arm "$arm")
    done
    place=launch/studies/$recipe
    mkdir -p "$place"
    # The recipe as it was when its study began, for later results to be of the same one.
    [[ -f $place/recipe.yaml ]] || cp "launch/recipes/$recipe.yaml" "$place"/recipe.yaml
    study=(.venv/bin/pkd study "$place/recipe.yaml" --study-folder "$place" "${more[@]}")
    # What one arm or seed lacks in the end is said, and keeps the others from nothing. Every process knows all seeds, so that
    # none takes what there is for the whole study.
    study+=(--seeds "$(printf '%s,' ${SEEDS:-0 1 2 3 4})")
    printf '%s\n' ${SEEDS:-0 1 2 3 4} | OMP_NUM_THREADS=1 xargs -P "$(nproc)" -I% "${study[@]}" --only-seed % || status=$?
    "${study[@]}" || status=$?
done
exit "$status"
